"""A job's first optimizer step after its claim: in a process that kept the base of the job before, and in a new one.

The whole way of a worker is measured, on real Postgres and a directory store: inputs read, files fetched, the base in
the cache looked at, the task given to the child, rows tokenized, layers injected, one step. The peer is the same worker
with DEPOT_WARM_BYTES=0, which starts a process and loads the base for every job, as every trainer that runs one process
per job does."""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.harness import Row, paired, smaller_is_better, write
from bench.servers import servers
from registry.db import make_engine, make_sessions, transaction
from registry.jobs.lease import claim
from registry.storage.local import LocalStore
from tests.tiny import make_base, make_rows
from tests.worker.depot import Depot, make_depot
from worker.attempt import Attempt
from worker.base_cache import BaseCache
from worker.host import Host
from worker.news import News
from worker.protocol import StepMessage
from worker.run_job import run_job
from worker.service import CHILD_ARGV, cpu_count
from worker.supervisor import Patience
from worker.warm import WarmPool
from worker.workspace import WorkDir

LEASE_SECONDS, TARGET_SECONDS, HOURS = 60.0, 2.0, 3600.0


class Watch(News):
    """Remembers when the first step was told."""

    first: float | None = None

    def step(self, step: StepMessage) -> None:
        self.first = self.first or time.perf_counter()
        super().step(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-warm-") as name, servers(Path(name)) as (database, _):
        folder = Path(name)
        base = make_base(folder / "base", "llama", hidden=options.hidden, layers=options.layers, vocab=4096)
        depot, host = open_worker(folder, database, base)
        cold = replace(host, warm=WarmPool(slots=1, max_bytes=0, idle_seconds=HOURS))
        try:
            pair = paired(
                lambda: first_step(depot, host, options.rows),
                lambda: first_step(depot, cold, options.rows),
                rounds=options.rounds,
            )
        finally:
            host.warm.close()
            host.work.close()
        size = sum(file.stat().st_size for file in base.iterdir())
    row = smaller_is_better("claim to first step: base kept in memory vs new process", pair, unit="s")
    slowest = max(pair.ours)
    target = Row("the slowest of them", round(slowest, 4), None, "s", None, "", "≤ 2 s", slowest <= TARGET_SECONDS)
    note = (
        f"A Llama of {size / 2**20:.0f} MiB in float32, {options.rows} rows, r = 4 on q_proj and v_proj; one slot, "
        f"{cpu_count()} threads. Files lie in the base cache for both."
    )
    write("warm", [row, target], note=note)


def open_worker(folder: Path, database: str, base: Path) -> tuple[Depot, Host]:
    """A depot with this base, and a worker of one slot in this process."""
    sessions = make_sessions(make_engine(database))
    store = LocalStore(folder / "objects", secret=b"x" * 40, public_url="http://127.0.0.1:1")
    (folder / "scratch").mkdir()
    host = Host(
        name="bench",
        sessions=sessions,
        beats=sessions,
        store=store,
        work=WorkDir(folder / "work", "bench"),
        cache=BaseCache(folder / "cache", store),
        warm=WarmPool(slots=1, max_bytes=2**50, idle_seconds=HOURS),
        lease_seconds=LEASE_SECONDS,
        heartbeat_seconds=5.0,
        max_infra_failures=0,
        checkpoint_seconds=HOURS,
        threads=cpu_count(),
        patience=Patience(grace_seconds=10.0, stall_seconds=HOURS, detached_seconds=HOURS),
        child_argv=CHILD_ARGV,
    )
    return make_depot(sessions, store, folder / "scratch", base), host


def first_step(depot: Depot, host: Host, rows: int) -> float:
    """Seconds from a job's claim to its first step, as its worker hears of it."""
    job_id = depot.submit(rows=make_rows(rows), adapter="bench", max_steps=2)
    with transaction(depot.sessions) as session:
        job = claim(session, queues=["default"], worker=host.name, lease_seconds=LEASE_SECONDS)
    began = time.perf_counter()
    if job is None or job.fence is None:
        sys.exit("nothing to claim")
    attempt = Attempt(job_id=job.id, tenant_id=job.tenant_id, fence=job.fence)
    attempt.news = watch = Watch()
    run_job(host, attempt, job)
    state = depot.job(job_id)
    if state.state != "succeeded" or watch.first is None:
        sys.exit(f"the job is {state.state}: {state.error_message}")
    return watch.first - began


if __name__ == "__main__":
    main()
