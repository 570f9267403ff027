"""Cancelling: recorded at once, final for a queued job, delivered to a worker by its next heartbeat."""

import uuid

from sqlalchemy.orm import Session

from registry.errors import JobNotFound, JobTerminal
from registry.jobs.moves import finish, lock_job
from registry.jobs.states import TERMINAL, JobState
from registry.models import Job


def request_cancel(session: Session, *, tenant_id: uuid.UUID, job_id: uuid.UUID) -> Job:
    """Queued → cancelled, running → cancelling. Repeating it changes nothing; JobTerminal when the job ended
    otherwise."""
    job = lock_job(session, job_id)
    if job is None or job.tenant_id != tenant_id:
        raise JobNotFound
    if job.state == JobState.QUEUED:
        finish(session, job, JobState.CANCELLED)
    elif job.state == JobState.RUNNING:
        job.state = JobState.CANCELLING
        session.flush()
    elif job.state in TERMINAL and job.state != JobState.CANCELLED:
        raise JobTerminal(state=job.state)
    return job
