"""Reconciling Postgres with the object store: every byte a row names is there, and every count is right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import func, select, union_all
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.errors import ObjectMissing
from registry.models import BaseModelFile, Blob, CheckpointFile, File, MergeFile, VersionFile
from registry.storage import ObjectStore
from registry.storage.digests import digest_chunks


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as it should be, in a sentence."""

    kind: str
    subject: str
    message: str


def verify(sessions: SessionFactory, store: ObjectStore, *, digests: bool = False) -> Iterator[Difference]:
    """Every difference, as it is found; with `digests` all referenced bytes are read. Safe beside a running service:
    what looks wrong is looked at again before it is told."""
    with transaction(sessions) as session:
        yield from check_refs(session)
    for shard in range(256):
        yield from _check_shard(sessions, store, f"blobs/{shard:02x}/", digests=digests)


def check_refs(session: Session) -> Iterator[Difference]:
    """Blobs whose count is not the number of rows that refer to them."""
    rows = union_all(
        select(File.blob_id).where(File.deleted_at.is_(None)),
        select(VersionFile.blob_id),
        select(MergeFile.blob_id),
        select(CheckpointFile.blob_id),
        select(BaseModelFile.blob_id),
    ).subquery()
    counted = select(rows.c.blob_id, func.count().label("rows")).group_by(rows.c.blob_id).subquery()
    found = func.coalesce(counted.c.rows, 0)
    query = select(Blob.key, Blob.refs, found.label("rows"))
    query = query.outerjoin(counted, counted.c.blob_id == Blob.id).where(Blob.refs != found)
    for row in session.execute(query):
        yield Difference("refs", row.key, f"{row.rows} rows refer to it, but its count is {row.refs}.")


def _check_shard(sessions: SessionFactory, store: ObjectStore, prefix: str, *, digests: bool) -> Iterator[Difference]:
    # The store before the rows: a row exists before its first byte, so an object without one is a stranger.
    sizes = {found.key: found.size for found in store.list(prefix)}
    with transaction(sessions) as session:
        blobs = session.scalars(select(Blob).where(Blob.key.startswith(prefix, autoescape=True))).all()
    known = {blob.key: blob for blob in blobs}
    for blob in blobs:
        if blob.state == "stored" and sizes.get(blob.key) != blob.size:
            yield from _look_again(sessions, store, blob)
        elif blob.refs and digests:
            yield from _check_digest(store, blob)
    strangers = [key for key in sizes if key not in known or known[key].state == "deleted"]
    yield from _check_strangers(store, strangers, known)


def _look_again(sessions: SessionFactory, store: ObjectStore, blob: Blob) -> Iterator[Difference]:
    """Stored since the store was listed, or collected since the row was read? Then all is well."""
    found = _size(store, blob.key)
    if found == blob.size:
        return
    with transaction(sessions) as session:
        now = session.scalar(select(Blob.state).where(Blob.id == blob.id))
    if now != "stored":
        return
    if found is None:
        yield Difference("missing", blob.key, f"The object is not in the store; {blob.refs} rows refer to it.")
    else:
        yield Difference("size", blob.key, f"The object has {found} bytes instead of {blob.size}.")


def _check_digest(store: ObjectStore, blob: Blob) -> Iterator[Difference]:
    try:
        sha256, size = digest_chunks(store.open(blob.key))
    except ObjectMissing:
        return  # deleted since; if it should not have been, the next run says so
    if (sha256, size) != (blob.sha256, blob.size):
        yield Difference("digest", blob.key, f"The object's bytes are {sha256}, {size} bytes, not what they were.")


def _check_strangers(store: ObjectStore, keys: Sequence[str], known: dict[str, Blob]) -> Iterator[Difference]:
    for key in keys:
        if _size(store, key) is None:
            continue
        why = "was deleted, but is still in the store" if key in known else "is in the store, but no row names it"
        yield Difference("stranger", key, f"The object {why}.")


def _size(store: ObjectStore, key: str) -> int | None:
    try:
        return store.stat(key).size
    except ObjectMissing:
        return None
