"""How a job is getting on: its attempts, its place in the queue, its curves."""

import re
from dataclasses import asdict
from typing import Annotated

from fastapi import Query

from api.context import DepotDep, PrincipalDep, SessionDep
from api.openai.job_out import state_of
from api.openai.job_schemas import AttemptError, AttemptObject, MetricsObject, MetricsPoint, QueueObject
from api.openai.jobs import parse_job_id
from api.routing import Permission, Router
from api.schemas import Listing, listing, unix, unix_or_none
from registry import errors
from registry.ids import public_id
from registry.jobs.attempts import list_attempts
from registry.jobs.curves import MOST_POINTS, read_curve
from registry.jobs.queries import get_job
from registry.jobs.waiting import explain_waiting
from registry.models import JobAttempt

router = Router("Fine-tuning")
_ATTEMPT_ID = re.compile(r"attempt-([0-9]{1,9})")


@router.declare(
    "GET",
    "/fine_tuning/jobs/{job_id}/attempts",
    permission=Permission.JOBS_READ,
    summary="Read a job's attempts, newest first",
    returns=Listing[AttemptObject],
    raises=(errors.JobNotFound, errors.InvalidCursor),
)
def attempts(
    job_id: str,
    session: SessionDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Listing[AttemptObject]:
    """Every time a worker took the job: when, how far it came, and how it ended."""
    found = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    number = None
    if after is not None:
        if (match := _ATTEMPT_ID.fullmatch(after)) is None:
            raise errors.InvalidCursor(param="after")
        number = int(match[1])
    page = list_attempts(session, job_id=found.id, after=number, limit=limit)
    items = [attempt_object(attempt) for attempt in page.items]
    return listing(AttemptObject, items, has_more=page.has_more, cursor=lambda attempt: attempt.id)


@router.declare(
    "GET",
    "/fine_tuning/jobs/{job_id}/queue",
    permission=Permission.JOBS_READ,
    summary="Why does a job wait?",
    returns=QueueObject,
    raises=(errors.JobNotFound,),
)
def queue(job_id: str, session: SessionDep, depot: DepotDep, principal: PrincipalDep) -> QueueObject:
    """The job's place in its queue, the reason why it does not run yet, and a guess when it will."""
    found = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    waiting = explain_waiting(session, found, lately_seconds=depot.settings.lease_seconds)
    estimate = None if waiting is None else waiting.estimate_seconds
    return QueueObject(
        id=public_id("ftjob", found.id),
        state=state_of(found),
        queue=found.queue,
        priority=found.priority,
        position=None if waiting is None else waiting.position,
        reason=None if waiting is None else waiting.reason,
        message=None if waiting is None else waiting.message,
        until=None if waiting is None else unix_or_none(waiting.until),
        estimate_seconds=None if estimate is None else round(estimate),
    )


@router.declare(
    "GET",
    "/fine_tuning/jobs/{job_id}/metrics",
    permission=Permission.JOBS_READ,
    summary="Read a job's curves",
    returns=MetricsObject,
    raises=(errors.JobNotFound,),
)
def metrics(
    job_id: str,
    session: SessionDep,
    principal: PrincipalDep,
    points: Annotated[int, Query(ge=1, le=MOST_POINTS, description="The most points to answer with")] = 500,
) -> MetricsObject:
    """Losses, learning rate and speed by step. Neighbouring steps share a point when there are more than `points`."""
    found = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    curve = read_curve(session, job_id=found.id, points=points)
    return MetricsObject(
        id=public_id("ftjob", found.id), points=[MetricsPoint.model_validate(asdict(point)) for point in curve]
    )


def attempt_object(attempt: JobAttempt) -> AttemptObject:
    """An attempt row as clients see it."""
    error = None
    if attempt.error_class is not None:
        error = AttemptError.model_validate(
            {"class": attempt.error_class, "code": attempt.error_code, "message": attempt.error_message}
        )
    return AttemptObject.model_validate(
        {
            "id": f"attempt-{attempt.attempt}",
            "attempt": attempt.attempt,
            "fence": attempt.fence,
            "worker": attempt.worker,
            "started_at": unix(attempt.started_at),
            "ended_at": unix_or_none(attempt.ended_at),
            "ending": attempt.ending,
            "error": error,
            "last_step": attempt.last_step,
            "resume": attempt.resume,
        }
    )
