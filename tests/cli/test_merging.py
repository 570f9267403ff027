"""`download --merged --base`: only the adapter travels, and the result is what the server would have stored."""

import hashlib
import json
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path

import pytest

from cli.client import Client
from cli.connection import Connection
from cli.merge_options import MergeOptions, bytes_of
from cli.merging import REPORT_FILE
from lora_core.merge import merge
from lora_core.plan import plan_merge
from registry.blobs import store_file
from registry.db import transaction
from registry.jobs.lease import claim
from registry.jobs.publish import publish_merge
from registry.storage.digests import digest_file
from tests.cli.conftest import Run
from tests.cli.live import Depot
from tests.cli.test_client import submit
from tests.lora_core.adapters import make_peft_adapter
from tests.tiny import make_base

PLAIN = MergeOptions()
OTHER = MergeOptions(dtype="float32", scale=0.5, shard_size=65_536, start="nf4")
FLAGS = ("--dtype", "float32", "--scale", "0.5", "--shard-size", "65536", "--start", "nf4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 numbers, as 4 bits want them."""
    return make_base(tmp_path_factory.mktemp("tiny") / "base", hidden=64, shards=3)


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(tiny, tmp_path_factory.mktemp("adapter") / "adapter", r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def stored(tiny: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored") / "stored"
    merge(tiny, adapter, out)
    return out


@pytest.fixture(scope="module")
def stored_nf4(tiny: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a worker makes of OTHER."""
    out = tmp_path_factory.mktemp("nf4") / "stored"
    recipe = plan_merge(tiny, adapter, start="nf4").recipe
    merge(tiny, adapter, out, recipe=recipe, dtype="float32", scale=0.5, shard_size=65_536)
    return out


@pytest.fixture(autouse=True)
def published(depot: Depot, run: Run, rows: str, tiny: Path, adapter: Path) -> None:
    """The adapter "bot" on a base whose bytes are those of `tiny`."""
    run("base", "add", "real", "--from", str(tiny))
    job = submit(run, rows, "--model", "real", "--adapter", "bot")
    names = ("adapter_config.json", "adapter_model.safetensors")
    recipe = plan_merge(tiny, adapter).recipe.to_json().decode()
    depot.publish(job, depot.claim(job), {name: (adapter / name).read_bytes() for name in names}, recipe=recipe)


def store_merge(depot: Depot, folder: Path) -> None:
    """What a worker does with a queued merge."""
    blobs: dict[str, uuid.UUID] = {}
    for path in folder.iterdir():
        sha256, size = digest_file(path)
        blobs[path.name] = store_file(depot.sessions, depot.store, path, sha256=sha256, size=size)
    with transaction(depot.sessions) as session:
        job = claim(session, queues=["default"], worker="w", lease_seconds=60)
        assert job is not None
        publish_merge(session, job_id=job.id, fence=job.fence or 0, files=blobs, digest="a" * 64, report={})


def request_merge(depot: Depot, options: MergeOptions = PLAIN) -> None:
    with Client(Connection(depot.url, depot.key)) as client:
        client.request_merge("bot", 1, options)


def download(run: Run, base: Path, out: Path, *more: str, status: int = 0) -> str:
    command = ("download", "bot@1", "--merged", "--base", str(base), "--out", str(out), *more)
    done = run(*command, status=status)
    return " ".join((done.output + done.stderr).split())


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.name != REPORT_FILE]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_bytes_are_those_of_the_stored_merge(
    depot: Depot,
    run: Run,
    tiny: Path,
    stored: Path,
    tmp_path: Path,
) -> None:
    request_merge(depot)
    store_merge(depot, stored)
    depot.wire.seen.clear()
    said = download(run, tiny, tmp_path / "out")
    assert "every file has the SHA-256 of the merge that the server stored" in said
    assert digests(tmp_path / "out") == digests(stored)
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["files"] == digests(stored)
    assert report["compared_with_server"] == sorted(digests(stored))
    assert report["base_is_registered"] is True
    assert depot.wire.count(b"GET /v1/objects/") == 2  # the adapter's two files and nothing else


def test_without_a_stored_merge_the_base_is_what_is_checked(
    run: Run,
    tiny: Path,
    stored: Path,
    tmp_path: Path,
) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / "added_tokens.json").write_text("{}")  # not part of the registered base, and not of the result
    assert "no such merge to compare with" in download(run, base, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(stored)


def test_what_the_server_stored_differently_is_not_kept(
    depot: Depot,
    run: Run,
    tiny: Path,
    stored: Path,
    tmp_path: Path,
) -> None:
    wrong = Path(shutil.copytree(stored, tmp_path / "wrong"))
    (wrong / "config.json").write_text("{}")
    request_merge(depot)
    store_merge(depot, wrong)
    assert "(digest_mismatch)" in download(run, tiny, tmp_path / "out", status=1)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_unless_told(run: Run, tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    shard = max(base.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert shard.name in download(run, base, tmp_path / "out", status=1)
    assert not (tmp_path / "out").exists()
    assert "NOT real as it is registered" in download(run, base, tmp_path / "out", "--allow-other-base")
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert (report["base_is_registered"], report["other_base_allowed"]) == (False, True)


def test_with_the_same_options_the_bytes_are_the_same(
    depot: Depot, run: Run, tiny: Path, stored_nf4: Path, tmp_path: Path
) -> None:
    request_merge(depot, OTHER)
    store_merge(depot, stored_nf4)
    said = download(run, tiny, tmp_path / "out", *FLAGS)
    assert "every file has the SHA-256 of the merge that the server stored" in said
    assert digests(tmp_path / "out") == digests(stored_nf4)
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert {name: report[name] for name in asdict(OTHER)} == asdict(OTHER)
    # a stored merge of other options is not what it is compared with
    assert "no such merge to compare with" in download(run, tiny, tmp_path / "plain")


def test_two_folders_merge_to_the_same_bytes_without_a_server(
    run: Run, tiny: Path, adapter: Path, stored_nf4: Path, tmp_path: Path
) -> None:
    run("merge", "--base", str(tiny), "--adapter", str(adapter), "--out", str(tmp_path / "out"), *FLAGS)
    assert digests(tmp_path / "out") == digests(stored_nf4)


def test_the_server_is_asked_for_what_was_asked_for(depot: Depot, run: Run, stored_nf4: Path, tmp_path: Path) -> None:
    request_merge(depot, OTHER)
    store_merge(depot, stored_nf4)
    run("download", "bot@1", "--merged", "--alias", "production", "--out", str(tmp_path / "out"), *FLAGS)
    assert digests(tmp_path / "out") == digests(stored_nf4)
    with Client(Connection(depot.url, depot.key)) as client:
        assert client.adapter("bot")["aliases"] == {"production": 1}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--base", "."], "--base goes with --merged"),
        (["--scale", "0.5"], "go with --merged"),
        (["--alias", "production"], "go with --merged"),
        (["--merged", "--base", ".", "--alias", "production"], "there is none"),
    ],
)
def test_what_does_not_go_together_is_refused(run: Run, flags: list[str], told: str) -> None:
    assert told in " ".join(run("download", "bot@1", *flags, status=1).stderr.split())


@pytest.mark.parametrize(
    "flags",
    [["--scale", "nan"], ["--scale", "101"], ["--shard-size", "1"], ["--shard-size", "2 pages"], ["--start", "x"]],
)
def test_options_that_mean_nothing_are_usage_errors(run: Run, flags: list[str]) -> None:
    run("download", "bot@1", "--merged", *flags, status=2)


@pytest.mark.parametrize(
    ("text", "size"), [("65536", 65_536), ("500MB", 500_000_000), ("2GiB", 2**31), ("64 ki", 65_536), ("1t", 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size
