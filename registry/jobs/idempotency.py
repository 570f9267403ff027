"""One request, one job, however often the client sends it."""

import re
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from registry.errors import IdempotencyKeyReused, InvalidIdempotencyKey
from registry.jobs.clock import NOW
from registry.models import IdempotencyKey

RETRY_WINDOW = timedelta(minutes=10)

_KEY = re.compile(r"[!-~]{1,255}")
_FOLDED = "retry: "  # no key that a client may send holds a space


@dataclass(frozen=True, slots=True)
class Idempotency:
    """How to recognise a repeated request. Made by `keyed` or, when the client sends no key, by `fold_retry`."""

    scope: str
    key: str
    request_sha256: bytes
    window: timedelta | None = None  # None: the key counts for as long as it is kept

    @classmethod
    def keyed(cls, scope: str, key: str, request_sha256: bytes) -> Self:
        """The client named the request itself; InvalidIdempotencyKey when the name cannot be one."""
        if not _KEY.fullmatch(key):
            raise InvalidIdempotencyKey(param="Idempotency-Key")
        return cls(scope, key, request_sha256)

    @classmethod
    def fold_retry(cls, scope: str, request_sha256: bytes, *, is_retry: bool) -> Self:
        """The body names the request: a declared retry within ten minutes is the same one, a first send never is."""
        return cls(scope, _FOLDED + request_sha256.hex(), request_sha256, RETRY_WINDOW if is_retry else timedelta())


def reserve(session: Session, idempotency: Idempotency, *, tenant_id: uuid.UUID, job_id: uuid.UUID) -> uuid.UUID:
    """The job that this request made: `job_id`, which the caller now inserts, or that of an earlier one.

    A concurrent duplicate waits here, on the unique index, until the first transaction ends."""
    session.execute(text("SET CONSTRAINTS fk_idempotency_keys_job_id_jobs DEFERRED"))
    row = {"scope": idempotency.scope, "key": idempotency.key, "request_sha256": idempotency.request_sha256}
    new = insert(IdempotencyKey).values(tenant_id=tenant_id, job_id=job_id, **row)
    primary_key = [IdempotencyKey.tenant_id, IdempotencyKey.scope, IdempotencyKey.key]
    if idempotency.window is None:
        new = new.on_conflict_do_nothing(index_elements=primary_key)
    else:
        outside = IdempotencyKey.created_at <= NOW - idempotency.window
        renewed = {"job_id": job_id, "created_at": NOW}
        new = new.on_conflict_do_update(index_elements=primary_key, set_=renewed, where=outside)
    if session.scalar(new.returning(IdempotencyKey.job_id)) is not None:
        return job_id
    return _earlier(session, idempotency, tenant_id)


def _earlier(session: Session, idempotency: Idempotency, tenant_id: uuid.UUID) -> uuid.UUID:
    found = session.execute(
        select(IdempotencyKey.request_sha256, IdempotencyKey.job_id).where(
            IdempotencyKey.tenant_id == tenant_id,
            IdempotencyKey.scope == idempotency.scope,
            IdempotencyKey.key == idempotency.key,
        )
    ).one()
    if found.request_sha256 != idempotency.request_sha256:
        raise IdempotencyKeyReused(param="Idempotency-Key")
    job_id: uuid.UUID = found.job_id
    return job_id
