"""Every claim of a job as a row of its own, opened and ended in the transactions that move the job."""

import uuid
from itertools import takewhile
from typing import Literal

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from registry.errors import InvalidCursor
from registry.jobs.clock import NOW
from registry.jobs.events import storable_text
from registry.models import Job, JobAttempt
from registry.paging import Page, take_page

CRASH_LOOP = 3
# What the training process did itself, as opposed to what happened around it.
CRASHES = frozenset({"trainer_crashed", "trainer_killed", "stalled", "host_out_of_memory", "internal"})

Ending = Literal["succeeded", "failed", "cancelled", "released", "lost"]


def open_attempt(session: Session, job: Job) -> None:
    """Records that `job` was just claimed."""
    session.add(JobAttempt(job_id=job.id, attempt=job.attempt, fence=job.fence, worker=job.worker))
    session.flush()


def end_attempt(
    session: Session,
    job: Job,
    ending: Ending,
    *,
    error_class: str | None = None,
    code: str | None = None,
    message: str | None = None,
) -> None:
    """Records how the job's current attempt ended, once. The caller holds the job's row lock."""
    step = last_step(job)
    ended = {
        "ended_at": NOW,
        "ending": ending,
        "error_class": error_class,
        "error_code": code,
        "error_message": None if message is None else storable_text(message),
        "last_step": step,
    }
    current = (JobAttempt.job_id == job.id, JobAttempt.attempt == job.attempt, JobAttempt.ended_at.is_(None))
    session.execute(update(JobAttempt).where(*current).values(ended), execution_options={"synchronize_session": False})


def last_step(job: Job) -> int | None:
    """The last step that the current attempt is known to have done, or to have gone on from."""
    progress = job.progress or {}
    steps = [progress.get("step"), progress.get("checkpoint_step")]
    return max((step for step in steps if isinstance(step, int)), default=None)


def count_endings(session: Session, job_id: uuid.UUID, error_class: str) -> int:
    """How many attempts ended in this class of failure."""
    found = select(func.count()).select_from(JobAttempt)
    return session.scalars(found.where(JobAttempt.job_id == job_id, JobAttempt.error_class == error_class)).one()


def crashes_in_a_row(session: Session, job_id: uuid.UUID, step: int) -> int:
    """How many of the latest attempts crashed at this step, one after the other. Attempts that were given back or lost
    with their worker say nothing about the step."""
    ended = select(JobAttempt.last_step, JobAttempt.error_code).order_by(JobAttempt.attempt.desc()).limit(CRASH_LOOP)
    rows = session.execute(ended.where(JobAttempt.job_id == job_id, JobAttempt.ending == "failed"))
    return sum(1 for _ in takewhile(lambda row: row.last_step == step and row.error_code in CRASHES, rows))


def list_attempts(session: Session, *, job_id: uuid.UUID, after: int | None, limit: int) -> Page[JobAttempt]:
    """A job's attempts, newest first; `after` is the number of the last one seen."""
    query = select(JobAttempt).where(JobAttempt.job_id == job_id)
    if after is not None:
        if session.scalar(query.where(JobAttempt.attempt == after)) is None:
            raise InvalidCursor(param="after")
        query = query.where(JobAttempt.attempt < after)
    return take_page(session, query.order_by(JobAttempt.attempt.desc()), limit=limit)
