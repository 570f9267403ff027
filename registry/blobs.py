"""Bytes and who refers to them. A row exists before the first byte; references are counted in the transaction that
adds or drops them."""

import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import update
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.errors import BlobGone
from registry.failpoints import hit
from registry.models import Blob
from registry.storage.base import ObjectStore
from registry.storage.keys import blob_key


def store_file(
    sessions: SessionFactory,
    store: ObjectStore,
    path: Path,
    *,
    sha256: str,
    size: int,
    tenant_id: uuid.UUID | None = None,
    job_id: uuid.UUID | None = None,
    fence: int | None = None,
) -> uuid.UUID:
    """Puts the bytes of `path` under a new key and returns their blob; whoever wants to keep them takes a reference.

    A crash at any point leaves an unreferenced row that garbage collection finds; no transaction is open meanwhile.
    BlobGone if the collector was faster than the upload."""
    blob_id = uuid.uuid4()
    key = blob_key(sha256, blob_id)
    with transaction(sessions) as session:
        session.add(
            Blob(id=blob_id, tenant_id=tenant_id, job_id=job_id, fence=fence, sha256=sha256, size=size, key=key)
        )
    hit("blob.intent")
    store.put(key, path, sha256=sha256, size=size)
    hit("blob.sent")
    try:
        with transaction(sessions) as session:
            _mark_stored(session, blob_id)
    except BlobGone:
        store.delete(key)  # collected before its bytes had arrived: nobody else would look for them again
        raise
    hit("blob.stored")
    return blob_id


def take_refs(session: Session, blob_ids: Iterable[uuid.UUID]) -> None:
    """Adds one reference per mention; BlobGone when some blob is no longer stored.

    The UPDATE, not a SELECT, takes the reference: a collector that read `refs = 0` before it loses its own guarded
    UPDATE. Rows are locked in id order so that two publications cannot deadlock."""
    for blob_id, mentions in sorted(Counter(blob_ids).items()):
        taken = session.execute(
            update(Blob)
            .where(Blob.id == blob_id, Blob.state == "stored")
            .values(refs=Blob.refs + mentions)
            .returning(Blob.id)
        )
        if taken.one_or_none() is None:
            raise BlobGone(blob_id=str(blob_id))


def drop_refs(session: Session, blob_ids: Iterable[uuid.UUID]) -> None:
    """Drops one reference per mention; the bytes themselves are removed later, by garbage collection."""
    for blob_id, mentions in sorted(Counter(blob_ids).items()):
        session.execute(update(Blob).where(Blob.id == blob_id).values(refs=Blob.refs - mentions))


def _mark_stored(session: Session, blob_id: uuid.UUID) -> None:
    stored = session.execute(
        update(Blob).where(Blob.id == blob_id, Blob.state == "intent").values(state="stored").returning(Blob.id)
    )
    if stored.one_or_none() is None:
        raise BlobGone(blob_id=str(blob_id))
