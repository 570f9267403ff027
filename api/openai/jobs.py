"""`/v1/fine_tuning/jobs`, as OpenAI's clients know it."""

import re
import uuid
from typing import Annotated

from fastapi import Header, Query, Request, Response

from api.context import DepotDep, PrincipalDep, SessionDep
from api.openai.job_accept import REFUSALS, accept, recognise
from api.openai.job_out import checkpoint_object, event_object, job_object, show_job
from api.openai.job_request import CREATE, JobCreate
from api.openai.schemas import CheckpointObject, EventObject, JobObject
from api.refusals import InvalidValue
from api.routing import Permission, Router
from api.schemas import Listing, listing
from registry import errors
from registry.ids import parse_id
from registry.jobs.cancel import request_cancel
from registry.jobs.checkpoints import list_checkpoints
from registry.jobs.events import list_events
from registry.jobs.names import job_names
from registry.jobs.promote import published_as
from registry.jobs.queries import get_job, list_jobs

router = Router("Fine-tuning")
SCOPE = "POST /v1/fine_tuning/jobs"
_EVENT_ID = re.compile(r"ftevent-([0-9]{1,18})")
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)


@router.declare(
    "POST",
    "/fine_tuning/jobs",
    permission=Permission.JOBS_WRITE,
    summary="Train an adapter",
    returns=JobObject,
    raises=REFUSALS,
    extra={"requestBody": {"content": {"application/json": {"example": CREATE}}}},
)
def create_job(
    *,
    body: JobCreate,
    request: Request,
    response: Response,
    session: SessionDep,
    depot: DepotDep,
    principal: PrincipalDep,
    idempotency_key: Annotated[str | None, Header()] = None,
    x_stainless_retry_count: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> JobObject:
    """Queues a job that trains on `training_file` and publishes the next version of an adapter.

    A 2xx means the job is stored. Send an `Idempotency-Key` to be able to repeat the request safely; OpenAI's own
    client needs none, because the retries it makes by itself are recognised."""
    submitted = accept(
        session,
        body,
        tenant_id=principal.tenant_id,
        settings=depot.settings,
        request=request.state.json,
        idempotency=recognise(request, SCOPE, idempotency_key, x_stainless_retry_count),
    )
    if submitted.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return show_job(session, submitted.job)


@router.declare(
    "GET",
    "/fine_tuning/jobs",
    permission=Permission.JOBS_READ,
    summary="List jobs, newest first",
    returns=Listing[JobObject],
    raises=(errors.InvalidCursor,),
)
def jobs(
    *,
    request: Request,
    session: SessionDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    metadata: Annotated[str | None, Query(description="Written `metadata[key]=value`, once per pair")] = None,
) -> Listing[JobObject]:
    """Your jobs. `metadata[team]=support` keeps those whose metadata has this pair."""
    if metadata is not None:
        raise InvalidValue("Write `metadata[key]=value`.", param="metadata")
    wanted = {found[1]: value for name, value in request.query_params.items() if (found := _METADATA.fullmatch(name))}
    cursor = _cursor(after, "ftjob")
    page = list_jobs(session, tenant_id=principal.tenant_id, metadata=wanted or None, after=cursor, limit=limit)
    names = job_names(session, page.items)
    items = [job_object(job, names[job.id]) for job in page.items]
    return listing(JobObject, items, has_more=page.has_more, cursor=lambda job: job.id)


@router.declare(
    "GET",
    "/fine_tuning/jobs/{job_id}",
    permission=Permission.JOBS_READ,
    summary="Read a job",
    returns=JobObject,
    raises=(errors.JobNotFound,),
)
def job(job_id: str, session: SessionDep, principal: PrincipalDep) -> JobObject:
    """One job: `status` for OpenAI's clients, `state` and `progress` for more."""
    found = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    return show_job(session, found)


@router.declare(
    "POST",
    "/fine_tuning/jobs/{job_id}/cancel",
    permission=Permission.JOBS_WRITE,
    summary="Cancel a job",
    returns=JobObject,
    raises=(errors.JobNotFound, errors.JobTerminal),
)
def cancel(job_id: str, session: SessionDep, principal: PrincipalDep) -> JobObject:
    """Ends a queued job at once; a running one at its next heartbeat, until then its `state` is `cancelling`."""
    wanted = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    cancelled = request_cancel(session, tenant_id=principal.tenant_id, job_id=wanted.id)
    return show_job(session, cancelled)


@router.declare(
    "GET",
    "/fine_tuning/jobs/{job_id}/events",
    permission=Permission.JOBS_READ,
    summary="Read a job's events, newest first",
    returns=Listing[EventObject],
    raises=(errors.JobNotFound, errors.InvalidCursor),
)
def events(
    job_id: str,
    session: SessionDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> Listing[EventObject]:
    """What the job told: log lines, points of its curves, changes of its state."""
    found = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    cursor = None
    if after is not None:
        if (match := _EVENT_ID.fullmatch(after)) is None:
            raise errors.InvalidCursor(param="after")
        cursor = int(match[1])
    page = list_events(session, job_id=found.id, after=cursor, limit=limit)
    items = [event_object(event) for event in page.items]
    return listing(EventObject, items, has_more=page.has_more, cursor=lambda event: event.id)


@router.declare(
    "GET",
    "/fine_tuning/jobs/{job_id}/checkpoints",
    permission=Permission.JOBS_READ,
    summary="List a job's checkpoints, newest first",
    returns=Listing[CheckpointObject],
    raises=(errors.JobNotFound, errors.InvalidCursor),
)
def checkpoints(
    job_id: str,
    session: SessionDep,
    principal: PrincipalDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Listing[CheckpointObject]:
    """Where the job would go on from, were it interrupted now. The last two are kept, and none once it succeeded."""
    found = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    page = list_checkpoints(session, job_id=found.id, after=_cursor(after, "ftckpt"), limit=limit)
    adapter = job_names(session, [found])[found.id].adapter
    published = published_as(session, [checkpoint.id for checkpoint in page.items])
    items = [checkpoint_object(checkpoint, adapter, published.get(checkpoint.id)) for checkpoint in page.items]
    return listing(CheckpointObject, items, has_more=page.has_more, cursor=lambda checkpoint: checkpoint.id)


def parse_job_id(text: str) -> uuid.UUID:
    """The row id in a job's public id; JobNotFound for any other text."""
    if (found := parse_id("ftjob", text)) is None:
        raise errors.JobNotFound
    return found


def _cursor(after: str | None, prefix: str) -> uuid.UUID | None:
    if after is None:
        return None
    if (found := parse_id(prefix, after)) is None:
        raise errors.InvalidCursor(param="after")
    return found
