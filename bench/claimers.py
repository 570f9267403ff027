"""Processes that claim jobs and give them back, as the slots of so many workers would, and what they wait for."""

import multiprocessing
import random
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

from sqlalchemy import Engine, text

from registry.db import SessionFactory, make_engine, make_sessions, transaction
from registry.jobs.lease import claim, release

LEASE_SECONDS = 90.0
WARM_UP_SECONDS = 60.0
# Forked, not spawned: fifty interpreters that import SQLAlchemy would be the benchmark.
fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Claims:
    """What one run of all claimers measured: sorted milliseconds, and how Postgres fared."""

    milliseconds: list[float]
    errors: int
    per_second: float
    waiting: list[int]
    deadlocks: int

    def quantile(self, share: float) -> float:
        return round(self.milliseconds[min(len(self.milliseconds) - 1, int(share * len(self.milliseconds)))], 2)


def run_claimers(database: str, *, claimers: int, poll: float, seconds: float) -> Claims:
    start = fork.Barrier(claimers + 1)
    pipes = [fork.Pipe(duplex=False) for _ in range(claimers)]
    processes = [
        fork.Process(
            target=claimer,
            args=(database, number, start, sender),
            kwargs={"poll": poll, "seconds": seconds},
            daemon=True,
        )
        for number, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    watched = make_engine(database, pool_size=1)  # after the forks: no child inherits its connection
    waiting: list[int] = []
    before = deadlocks(watched)
    start.wait(WARM_UP_SECONDS)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        waiting.append(lock_waits(watched))
        time.sleep(0.05)
    parts: list[tuple[list[float], int]] = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join()
    after = deadlocks(watched)
    watched.dispose()
    taken = sorted(one for milliseconds, _ in parts for one in milliseconds)
    return Claims(taken, sum(errors for _, errors in parts), len(taken) / seconds, waiting, after - before)


def claimer(database: str, number: int, start: Barrier, results: Connection, *, poll: float, seconds: float) -> None:
    """Claims and gives back until the time is over; sends how long each claim took, and how many raised.

    Once before that too: a slot lives for days, and SQLAlchemy compiles every statement when it is first used."""
    sessions = make_sessions(make_engine(database, pool_size=1, statement_timeout_ms=60_000))
    dice = random.Random(number)
    milliseconds: list[float] = []
    errors = 0
    claim_and_release(sessions, f"worker-{number}")
    start.wait(WARM_UP_SECONDS)
    end = time.monotonic() + seconds
    due = time.monotonic() + dice.uniform(0, poll)
    while due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            milliseconds.append(claim_and_release(sessions, f"worker-{number}"))
        except Exception:  # whatever it was, this claim did not work
            errors += 1
        due = max(due + poll, time.monotonic())
    results.send((milliseconds, errors))


def claim_and_release(sessions: SessionFactory, worker: str) -> float:
    """Milliseconds of the claim alone."""
    begin = time.perf_counter()
    with transaction(sessions) as session:
        job = claim(session, queues=["default"], worker=worker, lease_seconds=LEASE_SECONDS)
    took = 1000 * (time.perf_counter() - begin)
    if job is None or job.fence is None:
        raise LookupError("a full queue had nothing to claim")
    with transaction(sessions) as session:
        release(session, job_id=job.id, fence=job.fence)
    return took


def lock_waits(engine: Engine) -> int:
    return count(engine, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")


def deadlocks(engine: Engine) -> int:
    return count(engine, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")


def count(engine: Engine, query: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(query)).scalar_one())
