"""Accepting work: the job, its idempotency key, its quota use and its wake-up, in one transaction."""

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.adapters import ensure_adapter
from registry.errors import InvalidHyperparameter, QuotaExceeded, UnknownTrainingFile, WrongRows
from registry.failpoints import hit
from registry.files import pin_file
from registry.jobs.clock import read_clock
from registry.jobs.conditions import IS_QUEUED
from registry.jobs.events import NewEvent, add_events
from registry.jobs.idempotency import Idempotency, reserve
from registry.jobs.lora_check import check_lora
from registry.jobs.placement import DEFAULT_PLACEMENT, Placement, check_queue
from registry.jobs.spec import MergeOptions, MergeSpec, TrainSpec
from registry.jobs.states import JobKind, JobState
from registry.models import BaseModel, File, Job, Outbox, Tenant, Version


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job a request made; `replayed` when an earlier send of the same request had already made it."""

    job: Job
    replayed: bool


def submit_training(
    session: Session,
    *,
    tenant_id: uuid.UUID,
    base_model: BaseModel,
    adapter_name: str,
    training_file: File,
    validation_file: File | None,
    spec: TrainSpec,
    request: dict[str, Any],
    idempotency: Idempotency | None,
    placement: Placement = DEFAULT_PLACEMENT,
    retry_of: uuid.UUID | None = None,
) -> Submitted:
    """Queues a training job that publishes to `adapter_name`; its files cannot be deleted until it ends. `retry_of` is
    the tenant's own job that this one repeats.

    Raises UnknownTargetModules, InvalidHyperparameter, UnknownTrainingFile, WrongRows, UnknownQueue, QuotaExceeded,
    IdempotencyKeyReused, and what ensure_adapter raises."""
    job_id = uuid.uuid4()
    if idempotency is not None:
        reserved = reserve(session, idempotency, tenant_id=tenant_id, job_id=job_id)
        if reserved != job_id:
            earlier = session.scalars(select(Job).where(Job.id == reserved, Job.tenant_id == tenant_id)).one()
            return Submitted(earlier, replayed=True)
    check_lora(spec.lora, base_model)
    _check_evaluation(spec, validation_file)
    _check_schedule(spec, training_file)
    check_queue(session, placement.queue)
    _lock_quota(session, tenant_id)
    for file, param in ((training_file, "training_file"), (validation_file, "validation_file")):
        if file is not None:
            _pin(session, tenant_id, file, spec, param)
    adapter = ensure_adapter(session, tenant_id=tenant_id, name=adapter_name, base_model=base_model)
    job = Job(
        id=job_id,
        tenant_id=tenant_id,
        kind=JobKind.TRAIN,
        spec=spec.model_dump(mode="json"),
        request=request,
        adapter_id=adapter.id,
        base_model_id=base_model.id,
        training_file_id=training_file.id,
        validation_file_id=validation_file.id if validation_file else None,
        queue=placement.queue,
        priority=placement.priority,
        deadline_seconds=placement.deadline_seconds,
        retry_of=retry_of,
    )
    return Submitted(_enqueue(session, job), replayed=False)


def submit_merge(
    session: Session, *, version: Version, options: MergeOptions, placement: Placement = DEFAULT_PLACEMENT
) -> Job:
    """Queues the job of a merge. The caller inserts the merge row, which decides whether one is needed."""
    _lock_quota(session, version.tenant_id)
    job = Job(
        id=uuid.uuid4(),
        tenant_id=version.tenant_id,
        kind=JobKind.MERGE,
        spec=MergeSpec(version_id=version.id, **options.model_dump()).model_dump(mode="json"),
        request={},
        adapter_id=version.adapter_id,
        base_model_id=version.adapter.base_model_id,
        queue=placement.queue,
        priority=placement.priority,
        deadline_seconds=placement.deadline_seconds,
    )
    return _enqueue(session, job)


def _check_evaluation(spec: TrainSpec, validation_file: File | None) -> None:
    for name in ("eval_steps", "early_stopping_patience"):
        if getattr(spec, name) is not None and validation_file is None:
            raise InvalidHyperparameter(
                f"`lora.{name}` needs a `validation_file` to evaluate on. Add one, or leave the setting out.",
                param=f"lora.{name}",
            )


def _check_schedule(spec: TrainSpec, training_file: File) -> None:
    """That AdaLoRA has a step left in which to take ranks away. Rows that are left out can make the run shorter still,
    which the trainer will say."""
    plan, rows = spec.lora.adalora, (training_file.report or {}).get("rows")
    if plan is None or rows is None:
        return
    steps = spec.total_steps(rows)
    if plan.tinit + plan.tfinal >= steps:
        raise InvalidHyperparameter(
            f"`tinit` and `tfinal` leave none of the {steps} steps of this training to take ranks away in. "
            "Lower them, or train for longer.",
            param="lora.adalora",
            steps=steps,
        )


def _lock_quota(session: Session, tenant_id: uuid.UUID) -> None:
    """Serialises this tenant's submits, so that counting and inserting are one step."""
    lock = select(Tenant.max_queued).where(Tenant.id == tenant_id).with_for_update(key_share=True)
    limit = session.scalars(lock).one()
    queued = select(func.count()).select_from(Job).where(Job.tenant_id == tenant_id, IS_QUEUED)
    used = session.scalars(queued).one()
    if used >= limit:
        raise QuotaExceeded(limit=limit, used=used)


def _pin(session: Session, tenant_id: uuid.UUID, file: File, spec: TrainSpec, param: str) -> None:
    if pin_file(session, tenant_id=tenant_id, file_id=file.id, purpose="fine-tune") is None:
        raise UnknownTrainingFile(param=param)
    kind = (file.report or {}).get("kind")
    if kind is not None and (kind == "preference") != (spec.method == "dpo"):
        raise WrongRows(param=param, kind=kind)


def _enqueue(session: Session, job: Job) -> Job:
    job.deadline_at = read_clock(session, ahead_seconds=job.deadline_seconds)
    session.add(job)
    session.flush()
    queued = NewEvent("state", "info", "The job is queued.", {"from": None, "to": JobState.QUEUED, "attempt": 0})
    add_events(session, job.id, None, [queued])
    session.add(Outbox(queue=job.queue, job_id=job.id))
    session.flush()
    hit("submit.before_commit")
    return job
