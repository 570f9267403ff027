"""Job and event rows as clients see them."""

from sqlalchemy.orm import Session

from api.openai.schemas import (
    CheckpointMetrics,
    CheckpointObject,
    Dpo,
    DpoHyperparameters,
    EventObject,
    Hyperparameters,
    JobError,
    JobObject,
    Method,
    Scheduling,
    Supervised,
)
from api.schemas import StoredObject, unix, unix_or_none
from registry.ids import public_id
from registry.jobs.names import JobNames, job_names
from registry.jobs.spec import TrainSpec
from registry.jobs.states import JobState
from registry.jobs.suggest import learning_rate_multiplier, suggest_patch
from registry.models import Checkpoint, Job, JobEvent

PAUSED = {JobState.QUEUED: "paused", JobState.RUNNING: "pausing"}


def show_job(session: Session, job: Job) -> JobObject:
    """A job row as clients see it, with the names of what it refers to."""
    return job_object(job, job_names(session, [job])[job.id])


def job_object(job: Job, names: JobNames) -> JobObject:
    """A job row as clients see it."""
    spec = TrainSpec.model_validate(job.spec)
    numbers = Hyperparameters(
        batch_size=spec.batch_size,
        learning_rate_multiplier=learning_rate_multiplier(job.request),
        n_epochs=spec.n_epochs,
    )
    shared = {"batch_size", "n_epochs", "lora", "seed", "method", "beta"}
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
        method=_method(spec, numbers),
        trained_tokens=job.trained_tokens,
        error=_error(job, names),
        seed=spec.seed,
        metadata=job.request.get("metadata"),
        adapter=names.adapter,
        version=names.version,
        lora={**spec.lora.model_dump(), **spec.model_dump(exclude=shared)},
        progress=job.progress,
        attempt=job.attempt,
        retry_of=public_id("ftjob", job.retry_of) if job.retry_of else None,
        depot=Scheduling(
            queue=job.queue,
            priority=job.priority,
            deadline_seconds=job.deadline_seconds,
            deadline_at=unix_or_none(job.deadline_at) if job.state == JobState.QUEUED else None,
        ),
    )


def _method(spec: TrainSpec, numbers: Hyperparameters) -> Method:
    if spec.method == "dpo":
        settings = DpoHyperparameters(**numbers.model_dump(), beta=spec.beta)
        return Method(type="dpo", dpo=Dpo(hyperparameters=settings))
    return Method(type="supervised", supervised=Supervised(hyperparameters=numbers))


def event_object(event: JobEvent) -> EventObject:
    return EventObject(
        id=f"ftevent-{event.id}",
        created_at=unix(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )


def checkpoint_object(checkpoint: Checkpoint, adapter: str, version: int | None) -> CheckpointObject:
    """A checkpoint row as clients see it; `version` is what it was published as."""
    found = (checkpoint.manifest.get("adapter") or {}).get("files", [])
    metrics = checkpoint.metrics
    return CheckpointObject(
        id=public_id("ftckpt", checkpoint.id),
        created_at=unix(checkpoint.created_at),
        fine_tuned_model_checkpoint=f"{adapter}@{version}" if version else f"{adapter}:ckpt-step-{checkpoint.step}",
        fine_tuning_job_id=public_id("ftjob", checkpoint.job_id),
        step_number=checkpoint.step,
        metrics=CheckpointMetrics(
            step=checkpoint.step, train_loss=metrics.get("train_loss"), valid_loss=metrics.get("valid_loss")
        ),
        bytes=sum(file["size"] for file in checkpoint.manifest["files"]),
        files=[StoredObject(path=file["path"], bytes=file["size"], sha256=file["sha256"]) for file in found],
        version=version,
    )


def state_of(job: Job) -> str:
    """The stored state, or what a pause makes of it."""
    if job.paused_at is not None and job.state in PAUSED:
        return PAUSED[JobState(job.state)]
    return job.state


def _error(job: Job, names: JobNames) -> JobError | None:
    if job.state != JobState.FAILED or job.error_code is None:
        return None
    patch = suggest_patch(job, context_length=names.context_length)
    return JobError(code=job.error_code, message=job.error_message or job.error_code, suggested_patch=patch)
