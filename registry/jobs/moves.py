"""Steps that every way out of a job shares. Callers hold the job's row lock."""

import uuid
from datetime import timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from registry.errors import FenceLost
from registry.jobs.clock import read_clock
from registry.jobs.events import storable_text
from registry.jobs.states import OWNED, JobKind, JobState
from registry.models import Job, Merge, Outbox
from registry.webhooks.deliveries import announce

LONGEST_BACKOFF_SECONDS = 15 * 60.0


def lock_job(session: Session, job_id: uuid.UUID) -> Job | None:
    """The job as it is now, locked until the transaction ends: where publish, cancel and reaper meet."""
    query = select(Job).where(Job.id == job_id).with_for_update()
    return session.scalar(query.execution_options(populate_existing=True))


def lock_owned(session: Session, job_id: uuid.UUID, fence: int) -> Job:
    """The job, locked, if `fence` still owns it; FenceLost otherwise."""
    job = lock_job(session, job_id)
    if job is None or job.fence != fence or job.state not in OWNED:
        raise FenceLost
    return job


def note_error(job: Job, *, error_class: str, code: str, message: str) -> None:
    """Shows on the job why its last attempt ended."""
    job.error_class, job.error_code, job.error_message = error_class, code, storable_text(message)


def requeue(session: Session, job: Job, *, delay_seconds: float) -> JobState:
    """Back to the queue, claimable after the delay, with a wake-up due then; unless it was paused meanwhile."""
    due = read_clock(session, ahead_seconds=delay_seconds)  # first: a query flushes half-made changes
    job.state = JobState.QUEUED
    job.lease_expires_at = None
    job.run_after = due
    if job.paused_at is None:
        job.deadline_at = due + timedelta(seconds=job.deadline_seconds)
        session.add(Outbox(queue=job.queue, job_id=job.id, next_at=due))
    session.flush()
    return JobState.QUEUED


def finish(session: Session, job: Job, state: JobState) -> JobState:
    """Ends the job for good. A merge that did not succeed makes room for the next request of the same merge."""
    now = read_clock(session)  # first: a query flushes half-made changes
    job.state = state
    job.lease_expires_at = None
    job.finished_at = now
    session.flush()
    if job.kind == JobKind.TRAIN:
        announce(session, job)
    if job.kind == JobKind.MERGE and state != JobState.SUCCEEDED:
        session.execute(update(Merge).where(Merge.job_id == job.id).values(live=False))
    return state


def backoff_seconds(first: float, failures: int, *, longest: float = LONGEST_BACKOFF_SECONDS) -> float:
    """`first`·2ⁿ for the n-th repeat, at most `longest`."""
    return min(longest, first * 2.0 ** min(failures, 30))
