"""Merged files that are computed while they are read: the bytes of a stored merge, in any range."""

import hashlib
import random
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from lora_core.merge import merge
from lora_core.plan import plan_merge
from registry import merged as service
from registry.base_models import base_files, create_base_model, get_base_model
from registry.db import SessionFactory, transaction
from registry.errors import ArtifactCorrupt
from registry.files import create_file
from registry.jobs.lease import claim
from registry.jobs.publish import publish_merge, publish_version
from registry.models import Version
from tests.api.conftest import bearer, refused
from tests.lora_core.adapters import make_peft_adapter
from tests.registry.storage.counting import CountingStore
from tests.tiny import make_base

URL = "/v1/adapters/bot/versions/1/merged"
REAL = "tiny/real"
# What a stored merge is asked for, by the folder of what it makes.
OPTIONS: dict[str, dict[str, Any]] = {
    "stored-base": {},
    "stored-float32": {"dtype": "float32"},
    "stored-quarter": {"scale": 0.25, "shard_size": 2**16},
    "stored-nf4": {"start": "nf4", "dtype": "float32", "shard_size": 2**17},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base in two shards, an adapter, and what a merge job makes of them, per dtype."""
    root = tmp_path_factory.mktemp("merged")
    base = make_base(root / "base", hidden=64, dtype="bfloat16", shards=2)
    adapter = make_peft_adapter(base, root / "adapter", r=4, target_modules="all-linear")
    for name, options in OPTIONS.items():
        given = dict(options)
        recipe = plan_merge(base, adapter, start=given.pop("start", "original")).recipe
        merge(base, adapter, root / name, recipe=recipe, **given)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def base(
    sessions: SessionFactory,
    put: Callable[..., uuid.UUID],
    tenant_id: uuid.UUID,
    app: FastAPI,
    folders: dict[str, Path],
) -> None:
    blobs = {path.name: put(path.read_bytes()) for path in sorted(folders["base"].iterdir())}
    with transaction(sessions) as session:
        files = {
            name: create_file(
                session, tenant_id=tenant_id, blob_id=blob, filename=name, purpose="base-model", report=None
            ).id
            for name, blob in blobs.items()
        }
        store = app.state.depot.store
        create_base_model(
            session, store=store, tenant_id=tenant_id, name=REAL, source="upload", revision=None, files=files
        )


@pytest.fixture
def publish_real(
    base: None,
    submit: Callable[..., Any],
    sessions: SessionFactory,
    put: Callable[..., uuid.UUID],
    folders: dict[str, Path],
) -> Callable[..., None]:
    def publish(*, recipe: bool, damage: Callable[[bytes], bytes] = bytes) -> None:
        assert submit(model=REAL, lora={"adapter": "bot", "r": 4}).status_code == 200
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = {name: put(damage((folders["adapter"] / name).read_bytes())) for name in names}
        with transaction(sessions) as session:
            job = claim(session, queues=["default"], worker="w", lease_seconds=60)
            assert job is not None
        text = plan_merge(folders["base"], folders["adapter"]).recipe.to_json().decode()
        with transaction(sessions) as session:
            publish_version(
                session,
                job_id=job.id,
                fence=job.fence or 0,
                files=files,
                manifest={"files": sorted(map(str, files.values())), "spec": job.spec},
                metrics=None,
                trained_tokens=10,
                merge_recipe=text if recipe else None,
            )

    return publish


@pytest.fixture
def version(publish_real: Callable[..., None]) -> None:
    publish_real(recipe=True)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, too, a checkpoint is there before anybody is told to come back."""
    monkeypatch.setattr(service, "PATIENCE_SECONDS", 120.0)


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=120, **options)


def weights_of(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


@pytest.mark.parametrize("recipe", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_file_is_that_of_the_stored_merge(
    client: TestClient, publish_real: Callable[..., None], folders: dict[str, Path], name: str, recipe: bool
) -> None:
    publish_real(recipe=recipe)
    listed = client.get(URL, params=OPTIONS[name]).json()
    stored = folders[name]
    assert {option: listed[option] for option in OPTIONS[name]} == OPTIONS[name]
    assert [file["path"] for file in listed["files"]] == sorted(path.name for path in stored.iterdir())
    for file in listed["files"]:
        answer = client.get(f"{URL}/{file['path']}", params=OPTIONS[name])
        assert answer.content == (stored / file["path"]).read_bytes()
        assert answer.headers["content-length"] == str(file["bytes"]) == str(len(answer.content))
        assert answer.headers["etag"] == file["etag"]


def test_any_range_is_that_part_of_the_file(client: TestClient, version: None, folders: dict[str, Path]) -> None:
    path = weights_of(folders["stored-base"])
    whole = path.read_bytes()

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, len(whole) - 1)).map(sorted))
    def check(ends: list[int]) -> None:
        first, last = ends
        part = client.get(f"{URL}/{path.name}", headers={"Range": f"bytes={first}-{last}"})
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {first}-{last}/{len(whole)}"
        assert part.content == whole[first : last + 1]

    check()


def test_conditions(client: TestClient, version: None, folders: dict[str, Path]) -> None:
    path = weights_of(folders["stored-base"])
    url, size = f"{URL}/{path.name}", path.stat().st_size
    head = client.head(url)
    etag = head.headers["etag"]
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(size))
    assert etag.startswith('"')
    ranged = {"Range": "bytes=0-9"}
    statuses = {
        "resumed": client.get(url, headers={**ranged, "If-Range": etag}).status_code,
        "changed": client.get(url, headers={**ranged, "If-Range": '"other"'}).status_code,
        "two ranges": client.get(url, headers={"Range": "bytes=0-1,4-5"}).status_code,
        "same": client.get(url, headers={"If-None-Match": f'"x", W/{etag}'}).status_code,
        "other": client.get(url, headers={"If-None-Match": '"x"'}).status_code,
        "head of a range": client.head(url, headers=ranged).status_code,
    }
    assert statuses == {
        "resumed": 206,
        "changed": 200,
        "two ranges": 200,
        "same": 304,
        "other": 200,
        "head of a range": 206,
    }
    beyond = client.get(url, headers={"Range": f"bytes={size}-"})
    refused(beyond, 416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{size}"
    refused(client.get(url, headers={"Range": "bytes=x"}), 400, "invalid_range")


def test_other_options_are_other_bytes_with_another_etag(client: TestClient, version: None) -> None:
    options = [*OPTIONS.values(), {"scale": 0.25}, {"shard_size": 2**16}, {"scale": 0.5}, {"start": "nf4"}]
    etags = [client.head(f"{URL}/config.json", params=one).headers["etag"] for one in options]
    assert len(set(etags)) == len(options)
    same = client.head(f"{URL}/config.json", params={"scale": "1", "dtype": "base", "start": "original"})
    assert same.headers["etag"] == etags[0]


def test_options_that_mean_nothing_are_refused(client: TestClient, version: None) -> None:
    queries = [
        ("dtype=int8", "invalid_value"),
        ("scale=nan", "invalid_value"),
        ("scale=inf", "invalid_value"),
        ("scale=-101", "invalid_value"),
        ("scale=much", "invalid_value"),
        ("shard_size=65535", "invalid_value"),
        ("shard_size=1e6", "invalid_type"),
        ("start=int4", "invalid_value"),
        ("Scale=1", "unknown_parameter"),
        ("alias=production", "unknown_parameter"),
    ]
    for query, code in queries:
        refused(client.get(f"{URL}?{query}"), 422, code)
        refused(client.get(f"{URL}/config.json?{query}"), 422, code)


def test_refusals(client: TestClient, version: None, other_key: str) -> None:
    refused(client.get(f"{URL}/absent.safetensors"), 404, "artifact_not_found")
    refused(client.get(f"{URL}/%2e%2e/secret"), 404, "artifact_not_found")
    refused(client.get("/v1/adapters/bot/versions/2/merged"), 404, "version_not_found")
    refused(client.get(URL, headers=bearer(other_key)), 404, "adapter_not_found")


def test_an_adapter_that_fits_no_tensor_is_refused(client: TestClient, publish_real: Callable[..., None]) -> None:
    publish_real(recipe=False, damage=lambda data: data.replace(b"layers.1.mlp.up_proj", b"layers.7.mlp.up_proj"))
    error = refused(client.get(URL), 409, "not_mergeable")
    assert error["details"]["reason"] == "key_mismatch"


def test_a_damaged_base_is_never_merged(
    client: TestClient, version: None, app: FastAPI, folders: dict[str, Path], tmp_path: Path
) -> None:
    weights = weights_of(folders["base"]).read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    (stored,) = [path for path in (tmp_path / "objects").rglob("*") if path.is_file() and sha256 in str(path)]
    stored.chmod(0o600)
    stored.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused(client.get(URL), 500, ArtifactCorrupt.code)
    stored.write_bytes(weights)  # a good copy is used at once: the refusal is not remembered
    assert client.get(URL).status_code == 200


def test_the_listing_knows_the_digests_of_a_stored_merge(
    client: TestClient, version: None, sessions: SessionFactory, put: Callable[..., uuid.UUID], folders: dict[str, Path]
) -> None:
    assert {file["sha256"] for file in client.get(URL).json()["files"]} == {None}
    client.post("/v1/adapters/bot/versions/1/merges", json={"dtype": "base"})
    blobs = {path.name: put(path.read_bytes()) for path in folders["stored-base"].iterdir()}
    with transaction(sessions) as session:
        job = claim(session, queues=["default"], worker="w", lease_seconds=60)
        assert job is not None
        publish_merge(session, job_id=job.id, fence=job.fence or 0, files=blobs, digest="a" * 64, report={})
    for file in client.get(URL).json()["files"]:
        assert file["sha256"] == hashlib.sha256(client.get(f"{URL}/{file['path']}").content).hexdigest()
    assert {file["sha256"] for file in client.get(URL, params={"dtype": "float32"}).json()["files"]} == {None}


def test_many_readers_share_the_blocks(
    server: str, key: str, version: None, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Any] = []
    compute = service.MergedCheckpoint.compute
    monkeypatch.setattr(
        service.MergedCheckpoint, "compute", lambda self, *a, **k: computed.append(a[1:]) or compute(self, *a, **k)
    )
    path = weights_of(folders["stored-base"])
    whole = path.read_bytes()

    def read(seed: int) -> bool:
        first = random.Random(seed).randrange(len(whole)) if seed else 0
        got = get(f"{server}{URL}/{path.name}", headers={**bearer(key), "Range": f"bytes={first}-"})
        return got.content == whole[first:]

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(read, range(24)))
    assert len(computed) < 24 * 2  # whoever came second found most of them


def test_four_adapters_downloaded_at_once_do_not_read_their_base_four_times(
    app: FastAPI, server: str, key: str, publish_real: Callable[..., None], sessions: SessionFactory
) -> None:
    def other(number: int) -> Callable[[bytes], bytes]:  # the last number of the last tensor is another
        return lambda data: data if data.startswith(b"{") else data[:-2] + bytes([number]) + data[-1:]

    for number in range(4):
        publish_real(recipe=True, damage=other(number))
    store = CountingStore(app.state.depot.store)
    app.state.depot = replace(app.state.depot, merged=service.VirtualMerges(store))
    with transaction(sessions) as session:
        files = base_files(session, get_base_model(session, REAL).id)
        sizes = {file.blob.key: file.blob.size for file in files if file.path.endswith(".safetensors")}
    urls = [f"{server}/v1/adapters/bot/versions/{number}/merged" for number in range(1, 5)]

    def read(url: str) -> str:
        files = get(url, headers=bearer(key)).json()["files"]
        names = [file["path"] for file in files if file["path"].endswith(".safetensors")]
        contents = [get(f"{url}/{name}", params={"dtype": "float32"}, headers=bearer(key)) for name in names]
        return hashlib.sha256(b"".join(content.raise_for_status().content for content in contents)).hexdigest()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(read, urls))) == 4
    # once to compare it with its digest, once to compute
    assert {name: store.sent[name] for name in sizes} == {name: 2 * size for name, size in sizes.items()}


def test_places_are_limited_and_given_back(client: TestClient, version: None, app: FastAPI) -> None:
    url = f"{URL}/config.json"
    for _ in range(service.MAX_READERS + 1):
        assert client.get(url).status_code == 200
    for _ in range(service.MAX_READERS):
        app.state.depot.merged.enter()
    busy = client.get(url)
    refused(busy, 503, "merges_busy")
    assert busy.headers["retry-after"]
    app.state.depot.merged.leave()
    assert client.get(url).status_code == 200


def test_a_deleted_version_is_gone(client: TestClient, version: None) -> None:
    assert client.get(URL).status_code == 200
    assert client.delete("/v1/adapters/bot/versions/1").status_code == 200
    refused(client.get(URL), 404, "version_not_found")


def test_the_recipe_of_a_version_is_not_read_with_it(version: None, sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        found = session.query(Version).one()
        assert "merge_recipe" not in found.__dict__


def test_the_recipe_is_told_if_there_is_one(
    client: TestClient, publish_real: Callable[..., None], folders: dict[str, Path]
) -> None:
    publish_real(recipe=True)
    publish_real(recipe=False)
    told = client.get("/v1/adapters/bot/versions/1/merge-recipe")
    assert told.headers["content-type"] == "application/json"
    assert told.content == plan_merge(folders["base"], folders["adapter"]).recipe.to_json()
    refused(client.get("/v1/adapters/bot/versions/2/merge-recipe"), 404, "artifact_not_found")
