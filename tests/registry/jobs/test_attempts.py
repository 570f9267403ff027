"""Every claim leaves a row that says how it ended."""

from typing import Any

import pytest
from sqlalchemy import select, update

from registry.db import SessionFactory, transaction
from registry.errors import FenceLost, InvalidCursor
from registry.jobs.attempts import list_attempts
from registry.jobs.cancel import request_cancel
from registry.jobs.clock import NOW
from registry.jobs.fail import fail
from registry.jobs.lease import heartbeat, release
from registry.jobs.reaper import tick
from registry.models import Control, Job, JobAttempt
from tests.registry.jobs.helpers import claim_one, claimed, expire_lease, make_due, publish, queue_jobs


def attempts_of(sessions: SessionFactory, job: Job) -> list[JobAttempt]:
    """First to last."""
    with sessions() as session:
        return list(session.scalars(select(JobAttempt).where(JobAttempt.job_id == job.id).order_by(JobAttempt.attempt)))


def end(sessions: SessionFactory, job: Job, how: str) -> None:
    owner: dict[str, Any] = {"job_id": job.id, "fence": job.fence or 0}
    if how == "publish":
        publish(sessions, job)
        return
    if how == "reap":
        expire_lease(sessions, job.id)
    with transaction(sessions) as session:
        if how == "cancel":
            request_cancel(session, tenant_id=job.tenant_id, job_id=job.id)
        if how in ("release", "cancel"):
            release(session, **owner)
        elif how == "reap":
            session.execute(update(Control).values(reaper_tick=NOW, hold_until=None))
            assert tick(session, lease_seconds=90, reaper_seconds=15, max_infra_failures=3) == 1
        else:
            fail(session, **owner, error_class=how, code="some_code", message="it broke", max_infra_failures=3)


def test_a_claim_opens_an_attempt(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    (attempt,) = attempts_of(sessions, job)
    assert (attempt.attempt, attempt.fence, attempt.worker) == (1, job.fence, "worker-1")
    assert attempt.ending is None and attempt.ended_at is None


@pytest.mark.parametrize(
    ("how", "ending", "error_class", "code"),
    [
        ("publish", "succeeded", None, None),
        ("release", "released", None, None),
        ("cancel", "cancelled", None, None),
        ("reap", "lost", "infra", "worker_lost"),
        ("infra", "failed", "infra", "some_code"),
        ("oom", "failed", "oom", "some_code"),
    ],
)
def test_every_way_out_is_written_on_the_attempt(
    sessions: SessionFactory, how: str, ending: str, error_class: str | None, code: str | None
) -> None:
    job = claimed(sessions)
    with transaction(sessions) as session:
        heartbeat(session, job_id=job.id, fence=job.fence or 0, lease_seconds=60, progress={"step": 41})
    end(sessions, job, how)
    (attempt,) = attempts_of(sessions, job)
    assert (attempt.ending, attempt.error_class, attempt.error_code) == (ending, error_class, code)
    assert attempt.ended_at is not None and attempt.last_step == 41


def test_the_next_claim_is_another_attempt(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    end(sessions, job, "infra")
    make_due(sessions)
    again = claim_one(sessions, "worker-2")
    assert again is not None
    first, second = attempts_of(sessions, job)
    assert (first.ending, second.ending) == ("failed", None)
    assert (second.attempt, second.worker, second.fence) == (2, "worker-2", again.fence)


def test_an_owner_that_lost_its_fence_ends_no_attempt(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    end(sessions, job, "reap")
    make_due(sessions)
    claim_one(sessions, "worker-2")
    with pytest.raises(FenceLost):
        end(sessions, job, "user")
    assert [attempt.ending for attempt in attempts_of(sessions, job)] == ["lost", None]


def test_attempts_are_paged_newest_first(sessions: SessionFactory) -> None:
    queue_jobs(sessions)
    for _ in range(3):
        job = claim_one(sessions)
        assert job is not None
        end(sessions, job, "release")
    with sessions() as session:
        page = list_attempts(session, job_id=job.id, after=None, limit=2)
        rest = list_attempts(session, job_id=job.id, after=2, limit=2)
        with pytest.raises(InvalidCursor):
            list_attempts(session, job_id=job.id, after=9, limit=2)
    assert [a.attempt for a in page.items] == [3, 2] and page.has_more
    assert [a.attempt for a in rest.items] == [1] and not rest.has_more
