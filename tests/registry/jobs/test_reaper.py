from datetime import timedelta
from functools import partial

import pytest
from sqlalchemy import func, select, update

from registry.db import SessionFactory, transaction
from registry.jobs.cancel import request_cancel
from registry.jobs.reaper import ON_HOLD, tick
from registry.models import Control, Job, Outbox
from tests.registry.jobs.helpers import claim_one, claimed, expire_lease, make_due, queue_jobs, race, reload

NOW = func.clock_timestamp()
STARTED = func.pg_postmaster_start_time()


def ticks(sessions: SessionFactory, *, reaper_seconds: float = 15, max_infra_failures: int = 10) -> int:
    with transaction(sessions) as session:
        return tick(session, lease_seconds=90, reaper_seconds=reaper_seconds, max_infra_failures=max_infra_failures)


def set_control(sessions: SessionFactory, **values: object) -> None:
    with transaction(sessions) as session:
        session.execute(update(Control).values(**values))


@pytest.fixture
def steady(sessions: SessionFactory) -> SessionFactory:
    """A reaper that ticked a moment ago and is not on hold."""
    set_control(sessions, reaper_tick=NOW, hold_until=None)
    return sessions


def test_a_silent_worker_loses_its_job_to_the_queue(steady: SessionFactory) -> None:
    job = claimed(steady)
    assert ticks(steady) == 0
    expire_lease(steady, job.id)
    assert ticks(steady) == 1
    stored = reload(steady, job.id)
    assert (stored.state, stored.infra_failures, stored.error_code) == ("queued", 1, "worker_lost")
    assert stored.fence is not None and job.fence is not None and stored.fence > job.fence
    with steady() as session:
        wakes = session.scalars(select(Outbox.job_id).where(Outbox.next_at == stored.run_after)).all()
    assert wakes == [job.id]
    again = claim_one(steady)  # at once: it waited for the lease already
    assert again is not None and again.id == job.id
    expire_lease(steady, job.id)
    assert ticks(steady) == 1
    assert claim_one(steady) is None  # not before its backoff


def test_a_job_that_keeps_losing_workers_fails(steady: SessionFactory) -> None:
    queue_jobs(steady)
    for state in ("queued", "queued", "failed"):
        make_due(steady)
        job = claim_one(steady)
        assert job is not None
        expire_lease(steady, job.id)
        assert ticks(steady, max_infra_failures=2) == 1
        assert reload(steady, job.id).state == state
    assert reload(steady, job.id).error_code == "worker_lost"


def test_a_cancelled_job_of_a_silent_worker_is_cancelled(steady: SessionFactory) -> None:
    job = claimed(steady)
    with transaction(steady) as session:
        request_cancel(session, tenant_id=job.tenant_id, job_id=job.id)
    expire_lease(steady, job.id)
    assert ticks(steady) == 1
    assert reload(steady, job.id).state == "cancelled"


# Each row leaves exactly one reason: Postgres may have started a second ago, so a gap of seconds would be two.
@pytest.mark.parametrize(
    ("last_tick", "reaper_seconds"),
    [
        (None, 15.0),
        (STARTED + timedelta(milliseconds=1), 1e-4),
        (NOW + timedelta(seconds=60), 15.0),
        (STARTED - timedelta(seconds=1), 72_000.0),
    ],
    ids=["first tick ever", "gap", "clock went back", "postgres restarted"],
)
def test_after_silence_of_our_own_nobody_is_declared_dead(
    sessions: SessionFactory, last_tick: object, reaper_seconds: float
) -> None:
    job = claimed(sessions)
    expire_lease(sessions, job.id)
    set_control(sessions, reaper_tick=last_tick, hold_until=None)
    assert ticks(sessions, reaper_seconds=reaper_seconds) == ON_HOLD
    assert ticks(sessions) == ON_HOLD
    assert reload(sessions, job.id).state == "running"
    with sessions() as session:
        control = session.scalars(select(Control)).one()
        assert control.hold_until is not None and control.reaper_tick is not None
        assert control.hold_until - control.reaper_tick > timedelta(seconds=60)
    set_control(sessions, hold_until=NOW)
    assert ticks(sessions) == 1


def test_two_reapers_collect_a_job_once(steady: SessionFactory) -> None:
    job = claimed(steady)
    expire_lease(steady, job.id)
    assert sorted(map(repr, race(*[partial(ticks, steady)] * 4))) == ["0", "0", "0", "1"]
    assert reload(steady, job.id).infra_failures == 1


def test_a_locked_job_does_not_stop_the_reaper(steady: SessionFactory) -> None:
    queue_jobs(steady, 2)
    held, free = claim_one(steady), claim_one(steady)
    assert held is not None and free is not None
    expire_lease(steady, held.id)
    expire_lease(steady, free.id)
    with transaction(steady) as holder:
        holder.execute(select(Job).where(Job.id == held.id).with_for_update())
        assert ticks(steady) == 1
    assert reload(steady, held.id).state == "running"
    assert reload(steady, free.id).state == "queued"
