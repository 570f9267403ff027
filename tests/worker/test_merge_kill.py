"""A worker that dies in the middle of a merge: nobody sees half of it, and the next one ends with the same bytes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api.main import create_app
from lora_core.adapter import save_adapter
from lora_core.digest import folder_digest
from lora_core.inject import inject
from lora_core.merge import merge
from lora_core.model import load_base
from lora_core.plan import plan_merge
from registry.db import SessionFactory, transaction
from registry.ids import parse_id
from registry.jobs.spec import LoraSpec
from registry.keys import create_key
from registry.settings import Settings
from registry.storage import ObjectStore
from registry.storage.digests import digest_file
from tests.tiny import make_base, randomize_adapter
from tests.worker.conftest import StartWorker
from tests.worker.depot import BASE_NAME, LORA, Depot, is_alive, make_depot, wait_until
from tests.worker.held_child import HELD, SHARD
from tests.worker.test_main_job import APP, publish

SHARD_BYTES = 2**20
SECRET = "x" * 40


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for some shards."""
    return make_base(tmp_path_factory.mktemp("large") / "base", hidden=256, layers=4, vocab=16_000)


@pytest.fixture(scope="module")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    model, _ = load_base(base_dir, "float32", device="cpu")
    config = replace(LoraSpec.model_validate(LORA).config(), base_model_name_or_path=BASE_NAME)
    inject(model, config, seed=0)
    save_adapter(model, config, directory)
    return randomize_adapter(directory)


@pytest.fixture
def depot(sessions: SessionFactory, store: ObjectStore, tmp_path: Path, base_dir: Path) -> Depot:
    (tmp_path / "scratch").mkdir()
    return make_depot(sessions, store, tmp_path / "scratch", base_dir)


@pytest.fixture
def api(depot: Depot, database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    with transaction(depot.sessions) as session:
        key = create_key(session, tenant_id=depot.tenant.id, name="test", pepper=SECRET.encode())
    app = create_app(
        Settings(
            database_url=database_url,
            store_url=f"file://{tmp_path}/objects",
            secret_key=SECRET,
            public_url="http://testserver",
            work_dir=tmp_path / "api",
        )
    )
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}, follow_redirects=False) as client:
        yield client
    app.state.depot.engine.dispose()


def finished_shards(work: Path) -> int:
    """Of the merge that is at work below this folder."""
    return sum(state.read_bytes().count(b"model-") for state in work.rglob("state.jsonl"))


def test_a_merge_whose_worker_dies_between_shards_is_invisible_until_it_is_whole(
    depot: Depot, api: TestClient, start_worker: StartWorker, base_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    recipe = plan_merge(base_dir, adapter_dir).recipe
    publish(depot, adapter_dir, recipe)
    options = {"dtype": "bfloat16", "shard_size": SHARD_BYTES}
    merge(base_dir, adapter_dir, tmp_path / "expected", recipe=recipe, dtype="bfloat16", shard_size=SHARD_BYTES)
    expected = {path.name: digest_file(path)[0] for path in (tmp_path / "expected").iterdir()}
    asked = api.post("/v1/adapters/support-bot/versions/1/merges", json={**options, "alias": "prod"}).json()
    address = f"/v1/merges/{asked['id']}"
    job_id = next(merge.job_id for merge in depot.merges() if merge.id == parse_id("merge", asked["id"]))

    assert sum(path.endswith(".safetensors") for path in expected) > SHARD
    (tmp_path / HELD).touch()
    worker = start_worker("tests.worker.held_app")
    wait_until(lambda: finished_shards(tmp_path / "work") == SHARD, what="a merge between two shards")
    children = worker.children()
    worker.kill()
    wait_until(lambda: not any(map(is_alive, children)), what="the end of the merging process")
    seen = api.get(address).json()
    assert (seen["status"], seen["digest"], seen["files"], seen["report"]) == ("running", None, [], None)
    assert api.get(f"{address}/files/config.json").json()["error"]["code"] == "merge_not_ready"
    assert api.get("/v1/adapters/support-bot").json()["aliases"] == {}

    start_worker(APP)
    wait_until(lambda: depot.job(job_id).state == "queued" or depot.job(job_id).attempt == 2, what="the reaper")
    depot.skip_backoff(job_id)
    wait_until(lambda: depot.job(job_id).state == "succeeded", seconds=120, what="the second attempt")
    done = api.get(address).json()
    assert depot.job(job_id).attempt == 2
    assert done["digest"] == f"sha256:{folder_digest(expected)}"
    assert {file["path"]: file["sha256"] for file in done["files"]} == expected
    assert api.get("/v1/adapters/support-bot").json()["aliases"] == {"prod": 1}
    assert done["report"]["canary"]["run"]
