"""Steering a job: pause and resume, as OpenAI's client calls them, and running a failed one again."""

from typing import Annotated, Any

from fastapi import Header, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from api.context import DepotDep, PrincipalDep, SessionDep
from api.json_patch import Operation, apply_patch
from api.openai.job_accept import REFUSALS, accept, recognise
from api.openai.job_out import show_job
from api.openai.job_request import JobCreate, RetryIn
from api.openai.jobs import parse_job_id
from api.openai.schemas import JobObject
from api.refusals import InvalidPatch
from api.routing import Permission, Router
from api.validation import explain_findings
from registry import errors
from registry.jobs.names import job_names
from registry.jobs.pause import request_pause
from registry.jobs.pause import resume as resume_job
from registry.jobs.queries import get_job
from registry.jobs.states import TERMINAL
from registry.jobs.suggest import suggest_patch
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
    return show_job(session, request_pause(session, tenant_id=principal.tenant_id, job_id=wanted.id))


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
    return show_job(session, resume_job(session, tenant_id=principal.tenant_id, job_id=wanted.id))


@router.declare(
    "POST",
    "/fine_tuning/jobs/{job_id}/retry",
    permission=Permission.JOBS_WRITE,
    summary="Run an ended job again",
    returns=JobObject,
    raises=(errors.JobNotFound, errors.JobNotEnded, errors.NoSuggestion, InvalidPatch, *REFUSALS),
    extra={"requestBody": {"content": {"application/json": {"example": {"patch": "suggested"}}}}},
)
def retry(
    *,
    job_id: str,
    request: Request,
    response: Response,
    session: SessionDep,
    depot: DepotDep,
    principal: PrincipalDep,
    body: RetryIn | None = None,
    idempotency_key: Annotated[str | None, Header()] = None,
    x_stainless_retry_count: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> JobObject:
    """Queues the same request as a new job, changed by `patch`: the one that the failed job suggests, or your own.

    The new job names the old one in `retry_of`, and keeps its seed unless the patch sets one."""
    old = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    if old.state not in TERMINAL:
        raise errors.JobNotEnded(state=old.state)
    scope = f"POST /v1/fine_tuning/jobs/{old.id}/retry"
    patched = patched_request(session, old, body or RetryIn())
    submitted = accept(
        session,
        parse_request(patched),
        tenant_id=principal.tenant_id,
        settings=depot.settings,
        request=patched,
        idempotency=recognise(request, scope, idempotency_key, x_stainless_retry_count),
        retry_of=old.id,
    )
    if submitted.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return show_job(session, submitted.job)


def patched_request(session: Session, job: Job, body: RetryIn) -> dict[str, Any]:
    """The request of an ended job with the changes asked for; NoSuggestion, InvalidPatch."""
    request = {"seed": job.spec["seed"], **{name: value for name, value in job.request.items() if value is not None}}
    if body.patch is None:
        return request
    operations = body.patch
    if operations == "suggested":
        suggested = suggest_patch(job, context_length=job_names(session, [job])[job.id].context_length)
        if suggested is None:
            raise errors.NoSuggestion(param="patch")
        operations = [Operation.model_validate(operation) for operation in suggested]
    patched: dict[str, Any] = apply_patch(request, operations)
    return patched


def parse_request(patched: dict[str, Any]) -> JobCreate:
    """The request as if it had just been sent; what is wrong with it is told like there."""
    try:
        return JobCreate.model_validate(patched)
    except ValidationError as error:
        findings = error.errors(include_url=False)
        for finding in findings:
            finding["loc"] = ("body", *finding["loc"])
        raise explain_findings(findings, body=patched, model=JobCreate) from None
