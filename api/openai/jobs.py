"""`/v1/fine_tuning/jobs`, as OpenAI's clients know it."""

import hashlib
import json
import re
import uuid
from typing import Annotated, Any

from fastapi import Header, Query, Request, Response
from sqlalchemy.orm import Session

from api.context import DepotDep, PrincipalDep, SessionDep
from api.openai.job_request import CREATE, JobCreate, multiplier_asked
from api.openai.schemas import EventObject, Hyperparameters, JobError, JobObject, Method, Scheduling, Supervised
from api.refusals import InvalidValue, MissingField, UnknownField
from api.routing import Permission, Router
from api.schemas import Listing, listing, unix, unix_or_none
from registry import errors
from registry.base_models import find_base_model
from registry.files import find_file
from registry.ids import parse_id, public_id
from registry.jobs.cancel import request_cancel
from registry.jobs.events import list_events
from registry.jobs.idempotency import Idempotency
from registry.jobs.names import JobNames, job_names
from registry.jobs.queries import get_job, list_jobs
from registry.jobs.spec import TrainSpec
from registry.jobs.states import JobState
from registry.jobs.submit import submit_training
from registry.keys import Principal
from registry.models import BaseModel, File, Job, JobEvent

router = Router("Fine-tuning")
SCOPE = "POST /v1/fine_tuning/jobs"
_EVENT_ID = re.compile(r"ftevent-([0-9]{1,18})")
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
PAUSED = {JobState.QUEUED: "paused", JobState.RUNNING: "pausing"}
_INVALID_BODY = (MissingField, UnknownField, InvalidValue)


@router.declare(
    "POST",
    "/fine_tuning/jobs",
    permission=Permission.JOBS_WRITE,
    summary="Train an adapter",
    returns=JobObject,
    raises=(
        *_INVALID_BODY,
        errors.UnknownBaseModel,
        errors.UnknownTrainingFile,
        errors.UnknownTargetModules,
        errors.InvalidHyperparameter,
        errors.AdapterNameMissing,
        errors.InvalidName,
        errors.BaseModelMismatch,
        errors.InvalidIdempotencyKey,
        errors.IdempotencyKeyReused,
        errors.UnknownQueue,
        errors.QuotaExceeded,
    ),
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
    spec, adapter_name = body.spec(), body.adapter_name()
    submitted = submit_training(
        session,
        tenant_id=principal.tenant_id,
        base_model=_base_model(session, body.model),
        adapter_name=adapter_name,
        training_file=_training_file(session, principal, body.training_file, "training_file"),
        validation_file=_training_file(session, principal, body.validation_file, "validation_file")
        if body.validation_file is not None
        else None,
        spec=spec,
        request=request.state.json,
        idempotency=_idempotency(request, idempotency_key, x_stainless_retry_count),
        placement=body.placement(deadline_seconds=depot.settings.deadline_seconds),
    )
    if submitted.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return job_object(submitted.job, job_names(session, [submitted.job])[submitted.job.id])


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
    page = list_jobs(session, tenant_id=principal.tenant_id, metadata=wanted or None, after=_cursor(after), limit=limit)
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
    return job_object(found, job_names(session, [found])[found.id])


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
    return job_object(cancelled, job_names(session, [cancelled])[cancelled.id])


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


def job_object(job: Job, names: JobNames) -> JobObject:
    """A job row as clients see it."""
    spec = TrainSpec.model_validate(job.spec)
    numbers = Hyperparameters(
        batch_size=spec.batch_size,
        learning_rate_multiplier=multiplier_asked(job.request),
        n_epochs=spec.n_epochs,
    )
    shared = {"batch_size", "n_epochs", "lora", "seed"}
    return JobObject(
        id=public_id("ftjob", job.id),
        created_at=unix(job.created_at),
        started_at=unix_or_none(job.started_at),
        finished_at=unix_or_none(job.finished_at),
        model=names.base_model,
        fine_tuned_model=names.ref,
        organization_id=public_id("org", job.tenant_id),
        # OpenAI's clients wait for three words; a job that is being cancelled has reached none of them.
        status="running" if job.state == JobState.CANCELLING else job.state,
        state=state_of(job),
        training_file=public_id("file", job.training_file_id) if job.training_file_id else "",
        validation_file=public_id("file", job.validation_file_id) if job.validation_file_id else None,
        hyperparameters=numbers,
        method=Method(supervised=Supervised(hyperparameters=numbers)),
        trained_tokens=job.trained_tokens,
        error=_error(job),
        seed=spec.seed,
        metadata=job.request.get("metadata"),
        adapter=names.adapter,
        version=names.version,
        lora={**spec.lora.model_dump(), **spec.model_dump(exclude=shared)},
        progress=job.progress,
        attempt=job.attempt,
        depot=Scheduling(
            queue=job.queue,
            priority=job.priority,
            deadline_seconds=job.deadline_seconds,
            deadline_at=unix_or_none(job.deadline_at) if job.state == JobState.QUEUED else None,
        ),
    )


def event_object(event: JobEvent) -> EventObject:
    return EventObject(
        id=f"ftevent-{event.id}",
        created_at=unix(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )


def state_of(job: Job) -> str:
    """The stored state, or what a pause makes of it."""
    if job.paused_at is not None and job.state in PAUSED:
        return PAUSED[JobState(job.state)]
    return job.state


def _error(job: Job) -> JobError | None:
    if job.state != JobState.FAILED or job.error_code is None:
        return None
    return JobError(code=job.error_code, message=job.error_message or job.error_code)


def parse_job_id(text: str) -> uuid.UUID:
    """The row id in a job's public id; JobNotFound for any other text."""
    if (found := parse_id("ftjob", text)) is None:
        raise errors.JobNotFound
    return found


def _cursor(after: str | None) -> uuid.UUID | None:
    if after is None:
        return None
    if (found := parse_id("ftjob", after)) is None:
        raise errors.InvalidCursor(param="after")
    return found


def _base_model(session: Session, name: str) -> BaseModel:
    found = find_base_model(session, name)
    if found is None:
        raise errors.UnknownBaseModel(param="model")
    return found


def _training_file(session: Session, principal: Principal, text: str, param: str) -> File:
    file_id = parse_id("file", text)
    file = find_file(session, tenant_id=principal.tenant_id, file_id=file_id, purpose="fine-tune") if file_id else None
    if file is None:
        raise errors.UnknownTrainingFile(param=param)
    return file


def _idempotency(request: Request, key: str | None, retry_count: str | None) -> Idempotency:
    """How to recognise this request when it comes again: the same words in any order, to the same address."""
    canonical: Any = json.dumps([SCOPE, request.state.json], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).digest()
    if len(request.headers.getlist("idempotency-key")) > 1:
        raise errors.InvalidIdempotencyKey(param="Idempotency-Key")
    if key is not None:
        return Idempotency.keyed(SCOPE, key, digest)
    is_retry = retry_count is not None and retry_count.isdecimal() and int(retry_count) > 0
    return Idempotency.fold_retry(SCOPE, digest, is_retry=is_retry)
