"""Chores outlive every outage and say it once."""

import logging
import threading
from pathlib import Path

import pytest
from sqlalchemy import func, select

from registry.db import transaction
from registry.dispatch import CeleryDispatcher
from registry.jobs.lease import claim
from registry.models import Job, Worker
from tests.worker.depot import Depot, wait_until
from worker.housekeeping import Chore, make_presence, make_reaper, make_relay


def end(chore: Chore) -> None:
    chore.stop()
    chore._thread.join()


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the worker's own code said, not what else runs in this process."""
    return [record for record in caplog.records if record.name.startswith("worker")]


def test_a_chore_survives_errors_and_logs_an_outage_once(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    recovered = threading.Event()

    def call() -> None:
        calls.append(1)
        if len(calls) <= 4:
            raise RuntimeError("the moon is in the way")
        recovered.set()

    caplog.set_level(logging.INFO, "worker")
    chore = Chore("test", call, seconds=0.001, longest_seconds=0.01)
    chore.start()
    assert recovered.wait(120)
    wait_until(lambda: len(calls) > 5)
    end(chore)
    assert [record.levelname for record in told(caplog)] == ["ERROR", "INFO"]


def test_a_worker_shows_that_it_is_there(depot: Depot) -> None:
    chore = make_presence(depot.sessions, name="w", queues=["gpu"], slots=2, seconds=0.05)
    chore.start()

    def seen() -> list[Worker]:
        with depot.sessions() as session:
            return list(session.scalars(select(Worker)))

    (worker,) = wait_until(seen)
    end(chore)
    assert (worker.queues, worker.slots) == (["gpu"], 2)


def test_without_redis_the_relay_says_so_once_and_the_reaper_works(
    depot: Depot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    depot.submit()
    with transaction(depot.sessions) as session:
        job = claim(session, queues=["default"], worker="dead", lease_seconds=0.01)
    assert job is not None
    nobody = CeleryDispatcher(f"redis+socket://{tmp_path}/nobody.sock")
    chores = [
        make_relay(depot.sessions, nobody.send, seconds=0.05),
        make_reaper(depot.sessions, seconds=0.05, lease_seconds=0.2, max_infra_failures=3),
    ]
    for chore in chores:
        chore.start()
    wait_until(lambda: depot.job(job.id).state == "queued")
    wait_until(lambda: any("relay" in record.message for record in caplog.records))
    for chore in chores:
        end(chore)
    with depot.sessions() as session:
        assert session.scalar(select(func.count()).select_from(Job).where(Job.infra_failures == 1)) == 1
    (warning,) = [record for record in told(caplog) if record.levelno >= logging.WARNING]
    assert warning.exc_info is None
