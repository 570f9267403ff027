"""Pausing: a queued job that may not be claimed. A running one is asked, by its next heartbeat, to let go first."""

import uuid
from datetime import timedelta

from sqlalchemy.orm import Session

from registry.errors import JobCancelling, JobNotFound, JobTerminal
from registry.jobs.clock import read_clock
from registry.jobs.events import NewEvent, add_events
from registry.jobs.moves import lock_job
from registry.jobs.states import TERMINAL, JobState
from registry.models import Job, Outbox


def request_pause(session: Session, *, tenant_id: uuid.UUID, job_id: uuid.UUID) -> Job:
    """Keeps the job from being claimed until it is resumed; repeating it changes nothing. JobTerminal, JobCancelling.

    A running job goes back to the queue without a penalty, unless it ends before its worker hears of this."""
    job = _lock_alive(session, tenant_id, job_id)
    if job.paused_at is None:
        job.paused_at = read_clock(session)
        job.deadline_at = None
        told = "The job is paused." if job.state == JobState.QUEUED else "The job is asked to pause."
        add_events(session, job.id, job.fence, [NewEvent("message", "info", told)])
    return job


def resume(session: Session, *, tenant_id: uuid.UUID, job_id: uuid.UUID) -> Job:
    """Lets a paused job be claimed again, in its old place; repeating it changes nothing.

    JobTerminal, JobCancelling."""
    job = _lock_alive(session, tenant_id, job_id)
    if job.paused_at is not None:
        now = read_clock(session)
        job.paused_at = None
        if job.state == JobState.QUEUED:
            job.deadline_at = now + timedelta(seconds=job.deadline_seconds)
            session.add(Outbox(queue=job.queue, job_id=job.id, next_at=max(now, job.run_after)))
        add_events(session, job.id, job.fence, [NewEvent("message", "info", "The job is resumed.")])
    return job


def _lock_alive(session: Session, tenant_id: uuid.UUID, job_id: uuid.UUID) -> Job:
    job = lock_job(session, job_id)
    if job is None or job.tenant_id != tenant_id:
        raise JobNotFound
    if job.state in TERMINAL:
        raise JobTerminal(state=job.state)
    if job.state == JobState.CANCELLING:
        raise JobCancelling
    return job
