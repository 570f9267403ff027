"""From a request's body to a queued job; shared by everything that makes jobs."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from sqlalchemy.orm import Session

from api.openai.job_request import JobCreate
from api.refusals import InvalidValue, MissingField, UnknownField
from registry import errors
from registry.base_models import find_base_model
from registry.files import find_file
from registry.ids import parse_id
from registry.jobs.idempotency import Idempotency
from registry.jobs.submit import Submitted, submit_training
from registry.models import BaseModel, File
from registry.settings import Settings

REFUSALS = (
    MissingField,
    UnknownField,
    InvalidValue,
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
)


def accept(
    session: Session,
    body: JobCreate,
    *,
    tenant_id: uuid.UUID,
    settings: Settings,
    request: Mapping[str, Any],
    idempotency: Idempotency,
    retry_of: uuid.UUID | None = None,
) -> Submitted:
    """Queues the job that `body` asks for; `request` is the same as it was sent. Raises REFUSALS."""
    spec, adapter_name = body.spec(), body.adapter_name()
    validation_file = None
    if body.validation_file is not None:
        validation_file = _training_file(session, tenant_id, body.validation_file, "validation_file")
    return submit_training(
        session,
        tenant_id=tenant_id,
        base_model=_base_model(session, body.model),
        adapter_name=adapter_name,
        training_file=_training_file(session, tenant_id, body.training_file, "training_file"),
        validation_file=validation_file,
        spec=spec,
        request=dict(request),
        idempotency=idempotency,
        placement=body.placement(deadline_seconds=settings.deadline_seconds),
        retry_of=retry_of,
    )


def recognise(request: Request, scope: str, key: str | None, retry_count: str | None) -> Idempotency:
    """How to recognise this request when it comes again: the same words in any order, to the same address."""
    canonical: Any = json.dumps([scope, request.state.json], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).digest()
    if len(request.headers.getlist("idempotency-key")) > 1:
        raise errors.InvalidIdempotencyKey(param="Idempotency-Key")
    if key is not None:
        return Idempotency.keyed(scope, key, digest)
    is_retry = retry_count is not None and retry_count.isdecimal() and int(retry_count) > 0
    return Idempotency.fold_retry(scope, digest, is_retry=is_retry)


def _base_model(session: Session, name: str) -> BaseModel:
    found = find_base_model(session, name)
    if found is None:
        raise errors.UnknownBaseModel(param="model")
    return found


def _training_file(session: Session, tenant_id: uuid.UUID, text: str, param: str) -> File:
    file_id = parse_id("file", text)
    file = find_file(session, tenant_id=tenant_id, file_id=file_id, purpose="fine-tune") if file_id else None
    if file is None:
        raise errors.UnknownTrainingFile(param=param)
    return file
