"""A merged file computed while it is sent, against the same file stored and sent by the same server, on loopback.

The server is a process of its own, as `lora-depot up` starts it, with a local store; its processor time is what counts
("per core used"). The file is larger than the cache of blocks, so that every download computes all of it. Four adapters
of one base are downloaded at once, too: what the server reads then, files and sockets, tells how often it read the
base.
"""

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from alembic import command
from alembic.config import Config
from sqlalchemy import select

from bench.checkpoints import R, write_adapter, write_base
from bench.harness import Row, paired, smaller_is_better, write
from cli.embedded.postgres import start_postgres
from lora_core.merge import merge
from lora_core.plan import plan_merge
from registry.base_models import create_base_model
from registry.blobs import store_file
from registry.db import SessionFactory, make_engine, make_sessions, transaction
from registry.files import create_file
from registry.ids import public_id
from registry.jobs.lease import claim
from registry.jobs.publish import publish_merge, publish_version
from registry.jobs.spec import MergeOptions
from registry.keys import create_key
from registry.merges import request_merge
from registry.models import Adapter, Version
from registry.storage.digests import digest_file
from registry.storage.local import LocalStore
from registry.tenants import default_tenant
from tests.factories import make_adapter, make_job
from tests.tiny import make_tokenizer

ROOT = Path(__file__).parent.parent
SECRET = "b" * 40
ADAPTERS = 4


@dataclass
class Depot:
    """A running server and the addresses of one file: computed, and stored."""

    process: psutil.Process
    http: httpx.Client
    computed: list[str]
    stored: str
    size: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--offsets", type=int, default=100)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-virtual-") as name, running(Path(name), options.layers) as depot:
        rows = [*compare(depot, options.rounds), first_bytes(depot, options.offsets), at_once(depot)]
        note = f"bf16 Llama, hidden 2048, {options.layers} layers, r = 16 on all linears; a shard of {depot.size} bytes"
    note += "; a stored file is read and hashed, a computed one multiplied in float64, added, rounded and checked"
    load_told = f"load at start {load:.1f} on {os.cpu_count()} cores"
    write("virtual_merge", rows, note=f"{note}; {load_told}")


def compare(depot: Depot, rounds: int) -> list[Row]:
    clock: dict[str, list[float]] = {"computed": [], "stored": []}

    def download(which: str, address: str) -> float:
        before, began = cpu_seconds(depot.process), time.perf_counter()
        with depot.http.stream("GET", address, follow_redirects=True) as response:
            response.raise_for_status()
            size = sum(len(chunk) for chunk in response.iter_raw())
        assert size == depot.size
        clock[which].append(time.perf_counter() - began)
        return cpu_seconds(depot.process) - before

    pair = paired(
        lambda: download("computed", depot.computed[0]), lambda: download("stored", depot.stored), rounds=rounds
    )
    speeds = [depot.size / 1e6 / statistics.median(clock[which][1:]) for which in ("computed", "stored")]
    return [
        smaller_is_better("sequential download, seconds of one core vs stored", pair, unit="s", at_least=0.5),
        Row(
            "sequential download by the clock",
            *(round(s, 1) for s in speeds),
            "MB/s",
            None,
            "medians",
            "none set",
            None,
        ),
    ]


def first_bytes(depot: Depot, count: int) -> Row:
    chance, seconds = random.Random(0), []
    for _ in range(count):
        began = time.perf_counter()
        headers = {"Range": f"bytes={chance.randrange(depot.size)}-"}
        with depot.http.stream("GET", depot.computed[0], headers=headers) as response:
            next(response.iter_raw())
            seconds.append(1000 * (time.perf_counter() - began))
    p95 = round(statistics.quantiles(seconds, n=20)[-1], 1)
    spread = f"median {statistics.median(seconds):.1f}, worst {max(seconds):.1f} of {count}"
    return Row("first byte at a random offset, p95", p95, None, "ms", None, spread, "≤ 100 ms", p95 <= 100)


def at_once(depot: Depot) -> Row:
    """Bytes that the server reads for a download of each adapter's file at the same time, against one alone."""

    def read_for(addresses: list[str]) -> float:
        before = depot.process.io_counters().read_chars
        with ThreadPoolExecutor(len(addresses)) as pool:
            assert list(pool.map(download, addresses)) == [depot.size] * len(addresses)
        return (depot.process.io_counters().read_chars - before) / 1e6

    def download(address: str) -> int:
        with depot.http.stream("GET", address) as response:
            response.raise_for_status()
            return sum(len(chunk) for chunk in response.iter_raw())

    together, alone = read_for(depot.computed), read_for(depot.computed[:1])
    what = f"bytes read for {len(depot.computed)} adapters of one base at once vs for one"
    ratio = round(alone / together, 3)
    return Row(what, round(together), round(alone), "MB", ratio, "1 run", "≥ 0.5 ×", ratio >= 0.5)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@contextmanager
def running(folder: Path, layers: int) -> Iterator[Depot]:
    base = write_base(folder / "base", layers=layers, vocab=32_000)
    adapters = [write_adapter(folder / f"adapter-{n}", layers=layers, alpha=2 * R + n) for n in range(ADAPTERS)]
    make_tokenizer(base)
    merge(base, adapters[0], folder / "merged")
    postgres = start_postgres(folder / "data", folder / "run", folder / "postgres.log", settings={"fsync": "off"})
    try:
        config = Config(ROOT / "alembic.ini")
        config.set_main_option("sqlalchemy.url", postgres.url.replace("%", "%%"))
        command.upgrade(config, "head")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        sessions = make_sessions(make_engine(postgres.url))
        store = LocalStore(folder / "objects", secret=SECRET.encode(), public_url=url)
        key, merge_id = fill(sessions, store, base, adapters, folder / "merged")
        env = {name: value for name, value in os.environ.items() if not name.startswith("DEPOT_")}
        env |= {"DEPOT_DATABASE_URL": postgres.url, "DEPOT_STORE_URL": f"file://{folder}/objects"}
        env |= {"DEPOT_SECRET_KEY": SECRET, "DEPOT_PUBLIC_URL": url, "DEPOT_LOG_LEVEL": "WARNING"}
        argv = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app", "--port", str(port)]
        with (folder / "api.log").open("wb") as log:
            server = subprocess.Popen([*argv, "--no-access-log"], cwd=ROOT, env=env, stdout=log, stderr=log)
        try:
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False) as http:
                for path in adapters:
                    wait_for(http, f"/v1/adapters/{path.name}/versions/1/merged")
                shard = max((folder / "merged").glob("*.safetensors"), key=lambda path: path.stat().st_size)
                yield Depot(
                    psutil.Process(server.pid),
                    http,
                    [f"/v1/adapters/{path.name}/versions/1/merged/{shard.name}" for path in adapters],
                    f"/v1/merges/{merge_id}/files/{shard.name}",
                    shard.stat().st_size,
                )
        finally:
            server.terminate()
            server.wait()
    finally:
        postgres.stop()


def wait_for(http: httpx.Client, address: str) -> None:
    """Until the server answers and has checked the base."""
    while True:
        try:
            if http.get(address).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def fill(
    sessions: SessionFactory, store: LocalStore, base: Path, adapters: list[Path], merged: Path
) -> tuple[str, str]:
    """A base, a version of each adapter and the stored merge of the first; the API key and the merge's id."""

    def put(folder: Path, names: list[str]) -> dict[str, uuid.UUID]:
        blobs = {}
        for name in names:
            sha256, size = digest_file(folder / name)
            blobs[name] = store_file(sessions, store, folder / name, sha256=sha256, size=size)
        return blobs

    known = {path.name for path in merged.iterdir()}
    base_blobs = put(base, sorted(path.name for path in base.iterdir() if path.name in known))
    merged_blobs = put(merged, sorted(known))
    with transaction(sessions) as session:
        tenant = default_tenant(session)
        key = create_key(session, tenant_id=tenant.id, name="bench", pepper=SECRET.encode())
        uploads = {
            name: create_file(
                session, tenant_id=tenant.id, blob_id=blob, filename=name, purpose="base-model", report=None
            ).id
            for name, blob in base_blobs.items()
        }
        model = create_base_model(
            session, store=store, tenant_id=tenant.id, name="bench", source="bench", revision=None, files=uploads
        )
    for adapter in adapters:
        files = put(adapter, ["adapter_config.json", "adapter_model.safetensors"])
        with transaction(sessions) as session:
            make_job(session, make_adapter(session, tenant, model, name=adapter.name))
        recipe = plan_merge(base, adapter).recipe.to_json().decode()
        done = {"manifest": {}, "metrics": None, "trained_tokens": 1}
        job_id, fence = claimed(sessions)
        with transaction(sessions) as session:
            publish_version(session, job_id=job_id, fence=fence, files=files, merge_recipe=recipe, **done)
    with transaction(sessions) as session:
        first = session.scalars(select(Version).join(Adapter).where(Adapter.name == adapters[0].name)).one()
        made, _ = request_merge(session, version=first, options=MergeOptions())
    job_id, fence = claimed(sessions)
    with transaction(sessions) as session:
        publish_merge(session, job_id=job_id, fence=fence, files=merged_blobs, digest="0" * 64, report={})
    return key, public_id("merge", made.id)


def claimed(sessions: SessionFactory) -> tuple[uuid.UUID, int]:
    """The one job that waits, and the fence of its claim."""
    with transaction(sessions) as session:
        job = claim(session, queues=["default"], worker="bench", lease_seconds=600)
        assert job is not None
        return job.id, job.fence or 0


if __name__ == "__main__":
    main()
