"""Collects jobs whose worker fell silent, unless the silence may be ours."""

from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.jobs.attempts import end_attempt
from registry.jobs.clock import NOW, read_clock
from registry.jobs.conditions import IS_OWNED, IS_QUEUED
from registry.jobs.events import NewEvent, add_events
from registry.jobs.fail import lose_attempt
from registry.jobs.moves import finish, note_error
from registry.jobs.states import JobState
from registry.models import Control, Job, fence_seq

ON_HOLD = -1
BATCH = 100
BACKOFF_SECONDS = 15.0
WORKER_LOST = "The worker that ran this job stopped answering."


def tick(session: Session, *, lease_seconds: float, reaper_seconds: float, max_infra_failures: int) -> int:
    """Collects expired leases and overdue jobs and answers how many; ON_HOLD while expiry proves nothing.

    After a gap in ticking, a restart of Postgres or a jump of its clock no heartbeat could have been recorded, so
    owners first get one full lease to renew. Every host may tick; one does at a time."""
    control = session.scalars(select(Control).with_for_update().execution_options(populate_existing=True)).one()
    now = read_clock(session)  # after the lock: a wait for it must not look like a clock that went back
    if _heartbeats_were_lost(session, control.reaper_tick, now, timedelta(seconds=reaper_seconds)):
        control.hold_until = now + timedelta(seconds=lease_seconds)
    control.reaper_tick = now
    session.flush()
    if control.hold_until is not None and control.hold_until > now:
        return ON_HOLD
    return _reap_expired(session, max_infra_failures) + _fail_overdue(session)


def _heartbeats_were_lost(session: Session, last: datetime | None, now: datetime, interval: timedelta) -> bool:
    if last is None:
        return True
    restarted: datetime = session.scalars(select(func.pg_postmaster_start_time())).one()
    return now - last > 3 * interval or now < last - interval or restarted > last


def _reap_expired(session: Session, max_infra_failures: int) -> int:
    expired = (
        select(Job)
        .where(IS_OWNED, Job.lease_expires_at < NOW)
        .order_by(Job.lease_expires_at)
        .limit(BATCH)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    jobs = session.scalars(expired).all()
    for job in jobs:
        _reap(session, job, max_infra_failures)
    return len(jobs)


def _fail_overdue(session: Session) -> int:
    """Ends jobs that nobody started before their deadline. Not while on hold: workers could not claim either."""
    overdue = select(Job).where(IS_QUEUED, Job.deadline_at < NOW).order_by(Job.deadline_at).limit(BATCH)
    locked = overdue.with_for_update(skip_locked=True).execution_options(populate_existing=True)
    jobs = session.scalars(locked).all()
    for job in jobs:
        waited = f"No worker took this job within {job.deadline_seconds} s. Start one that serves the queue"
        message = f"{waited} {job.queue!r}, then submit it again."
        note_error(job, error_class="deadline", code="deadline_exceeded", message=message)
        finish(session, job, JobState.FAILED)
    return len(jobs)


def _reap(session: Session, job: Job, max_infra_failures: int) -> None:
    lost = NewEvent("message", "warn", WORKER_LOST, {"error_class": "infra", "worker": job.worker})
    add_events(session, job.id, job.fence, [lost])
    end_attempt(session, job, "lost", error_class="infra", code="worker_lost", message=WORKER_LOST)
    job.fence = session.scalars(select(fence_seq.next_value())).one()  # the old owner is out at once
    if job.state == JobState.CANCELLING:
        finish(session, job, JobState.CANCELLED)
        return
    note_error(job, error_class="infra", code="worker_lost", message=WORKER_LOST)
    # It waited for a lease already: the first loss, most often nothing but a restart, costs no more than that.
    backoff = BACKOFF_SECONDS if job.infra_failures else 0.0
    lose_attempt(session, job, first_backoff=backoff, max_infra_failures=max_infra_failures)
