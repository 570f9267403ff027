"""A job that waits says why, and guesses for how long."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from registry.jobs.placement import note_worker
from registry.jobs.waiting import Waiting, explain_waiting
from registry.models import Adapter, Job, Worker
from tests.factories import make_adapter, make_job, make_tenant

NOW = func.clock_timestamp()


@pytest.fixture
def adapter(session: Session) -> Adapter:
    return make_adapter(session, make_tenant(session, max_running=2))


def explain(session: Session, job: Job) -> Waiting:
    session.refresh(job)
    waiting = explain_waiting(session, job, lately_seconds=90)
    assert waiting is not None
    return waiting


def staff(session: Session, slots: int = 1, queues: tuple[str, ...] = ("default",)) -> None:
    note_worker(session, name=f"w{slots}", queues=list(queues), slots=slots)


def make_ended(session: Session, adapter: Adapter, seconds: float) -> None:
    end = datetime.now(UTC)
    make_job(session, adapter, state="succeeded", started_at=end - timedelta(seconds=seconds), finished_at=end)


def test_only_a_queued_job_waits(session: Session, adapter: Adapter) -> None:
    job = make_job(session, adapter, state="running")
    assert explain_waiting(session, job, lately_seconds=90) is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"paused_at": NOW}, "paused"),
        ({"run_after": NOW + timedelta(hours=1), "error_code": "disk_full"}, "backoff"),
        ({"queue": "gpu"}, "no_worker"),
        ({}, "waiting_for_worker"),
    ],
)
def test_every_reason_has_its_word(session: Session, adapter: Adapter, values: dict[str, Any], reason: str) -> None:
    staff(session)
    assert explain(session, make_job(session, adapter, **values)).reason == reason


def test_a_backoff_says_until_when_and_why(session: Session, adapter: Adapter) -> None:
    job = make_job(session, adapter, run_after=NOW + timedelta(hours=1), error_code="disk_full")
    waiting = explain(session, job)
    assert waiting.until == job.run_after and "disk_full" in waiting.message
    assert waiting.estimate_seconds is not None and 3000 < waiting.estimate_seconds <= 3600


def test_a_tenant_at_its_limit_hears_so(session: Session, adapter: Adapter) -> None:
    staff(session, slots=8)
    for _ in range(2):
        make_job(session, adapter, state="running")
    waiting = explain(session, make_job(session, adapter))
    assert waiting.reason == "tenant_limit" and "limit of 2" in waiting.message


def test_a_worker_that_fell_silent_serves_nobody(session: Session, adapter: Adapter) -> None:
    staff(session)
    session.execute(update(Worker).values(seen_at=NOW - timedelta(seconds=91)))
    assert explain(session, make_job(session, adapter)).reason == "no_worker"


def test_the_position_counts_what_may_run_before(session: Session, adapter: Adapter) -> None:
    other = make_adapter(session, make_tenant(session))
    make_job(session, other)
    make_job(session, adapter, paused_at=NOW)
    make_job(session, adapter, queue="gpu")
    make_job(session, adapter, run_after=NOW + timedelta(hours=1), priority=1)
    job = make_job(session, adapter)
    make_job(session, adapter)
    assert explain(session, job).position == 2
    make_job(session, other, priority=1)
    assert explain(session, job).position == 2  # others overtake nobody by calling theirs urgent
    make_job(session, adapter, priority=1)
    assert explain(session, job).position == 3


def test_a_free_slot_means_now(session: Session, adapter: Adapter) -> None:
    staff(session, slots=2)
    make_job(session, adapter, state="running")
    assert explain(session, make_job(session, adapter)).estimate_seconds == 0


def test_the_estimate_is_rounds_of_what_such_jobs_took(session: Session, adapter: Adapter) -> None:
    staff(session, slots=1)
    make_job(session, adapter, state="running")
    first, second = make_job(session, adapter), make_job(session, adapter)
    assert explain(session, second).estimate_seconds is None  # nothing to go by
    make_ended(session, adapter, 100)
    make_ended(session, adapter, 300)
    assert explain(session, first).estimate_seconds == pytest.approx(200)
    assert explain(session, second).estimate_seconds == pytest.approx(400)
