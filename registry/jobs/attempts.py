"""Every claim of a job as a row of its own, opened and ended in the transactions that move the job."""

import uuid
from typing import Literal

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from registry.errors import InvalidCursor
from registry.jobs.clock import NOW
from registry.jobs.events import storable_text
from registry.models import Job, JobAttempt
from registry.paging import Page, take_page

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
    step = (job.progress or {}).get("step")
    ended = {
        "ended_at": NOW,
        "ending": ending,
        "error_class": error_class,
        "error_code": code,
        "error_message": None if message is None else storable_text(message),
        "last_step": step if isinstance(step, int) else None,
    }
    current = (JobAttempt.job_id == job.id, JobAttempt.attempt == job.attempt, JobAttempt.ended_at.is_(None))
    session.execute(update(JobAttempt).where(*current).values(ended), execution_options={"synchronize_session": False})


def count_bugs(session: Session, job_id: uuid.UUID) -> int:
    """How many attempts ended through a fault of ours."""
    bugs = select(func.count()).select_from(JobAttempt)
    return session.scalars(bugs.where(JobAttempt.job_id == job_id, JobAttempt.error_class == "bug")).one()


def list_attempts(session: Session, *, job_id: uuid.UUID, after: int | None, limit: int) -> Page[JobAttempt]:
    """A job's attempts, newest first; `after` is the number of the last one seen."""
    query = select(JobAttempt).where(JobAttempt.job_id == job_id)
    if after is not None:
        if session.scalar(query.where(JobAttempt.attempt == after)) is None:
            raise InvalidCursor(param="after")
        query = query.where(JobAttempt.attempt < after)
    return take_page(session, query.order_by(JobAttempt.attempt.desc()), limit=limit)
