"""Steering a job that has not ended: pause and resume, as OpenAI's client calls them."""

from sqlalchemy.orm import Session

from api.context import PrincipalDep, SessionDep
from api.openai.jobs import job_object, parse_job_id
from api.openai.schemas import JobObject
from api.routing import Permission, Router
from registry import errors
from registry.jobs.names import job_names
from registry.jobs.pause import request_pause
from registry.jobs.pause import resume as resume_job
from registry.jobs.queries import get_job
from registry.models import Job

router = Router("Fine-tuning")


@router.declare(
    "POST",
    "/fine_tuning/jobs/{job_id}/pause",
    permission=Permission.JOBS_WRITE,
    summary="Pause a job",
    returns=JobObject,
    raises=(errors.JobNotFound, errors.JobTerminal, errors.JobCancelling),
)
def pause(job_id: str, session: SessionDep, principal: PrincipalDep) -> JobObject:
    """Keeps a queued job from starting. A running one saves its work, then waits in the queue; until then its `state`
    is `pausing`. A paused job is `queued` in `status`, OpenAI's word, and `paused` in `state`."""
    wanted = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    return _shown(session, request_pause(session, tenant_id=principal.tenant_id, job_id=wanted.id))


@router.declare(
    "POST",
    "/fine_tuning/jobs/{job_id}/resume",
    permission=Permission.JOBS_WRITE,
    summary="Resume a paused job",
    returns=JobObject,
    raises=(errors.JobNotFound, errors.JobTerminal, errors.JobCancelling),
)
def resume(job_id: str, session: SessionDep, principal: PrincipalDep) -> JobObject:
    """Lets a paused job start again, in its old place in the queue."""
    wanted = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    return _shown(session, resume_job(session, tenant_id=principal.tenant_id, job_id=wanted.id))


def _shown(session: Session, job: Job) -> JobObject:
    return job_object(job, job_names(session, [job])[job.id])
