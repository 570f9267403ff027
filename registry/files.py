"""Uploaded files: training data, and the parts of a base model before it is registered."""

import re
import uuid
from typing import Any, Literal

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from registry.blobs import drop_refs, take_refs
from registry.errors import FileInUse, FileNotFound, InvalidFilename
from registry.ids import public_id
from registry.jobs.clock import read_clock
from registry.jobs.states import TERMINAL
from registry.models import File, Job
from registry.paging import Page, page_by_age

Purpose = Literal["fine-tune", "base-model"]

# No path, nothing a terminal or an HTTP header would act on, no half of a surrogate pair.
_FILENAME = re.compile(r"[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,255}")


def create_file(
    session: Session,
    *,
    tenant_id: uuid.UUID,
    blob_id: uuid.UUID,
    filename: str,
    purpose: Purpose,
    report: dict[str, Any] | None,
) -> File:
    """Registers stored bytes as a file of this tenant and takes a reference to them."""
    if not _FILENAME.fullmatch(filename) or filename in {".", ".."}:
        raise InvalidFilename(param="file")
    take_refs(session, [blob_id])
    file = File(tenant_id=tenant_id, blob_id=blob_id, filename=filename, purpose=purpose, report=report)
    session.add(file)
    session.flush()
    return file


def find_file(
    session: Session, *, tenant_id: uuid.UUID, file_id: uuid.UUID, purpose: Purpose | None = None
) -> File | None:
    """This tenant's file, unless it is deleted or has another purpose."""
    return session.scalar(_alive(tenant_id, purpose).where(File.id == file_id))


def get_file(session: Session, *, tenant_id: uuid.UUID, file_id: uuid.UUID) -> File:
    """This tenant's file; FileNotFound."""
    file = find_file(session, tenant_id=tenant_id, file_id=file_id)
    if file is None:
        raise FileNotFound
    return file


def pin_file(session: Session, *, tenant_id: uuid.UUID, file_id: uuid.UUID, purpose: Purpose) -> File | None:
    """Like find_file, and nobody deletes the file before this transaction ends: for those who will refer to it."""
    query = _alive(tenant_id, purpose).where(File.id == file_id)
    return session.scalar(query.with_for_update(read=True, key_share=True, of=File))


def list_files(
    session: Session,
    *,
    tenant_id: uuid.UUID,
    purpose: Purpose | None = None,
    after: uuid.UUID | None = None,
    limit: int,
    order: Literal["asc", "desc"] = "desc",
) -> Page[File]:
    """This tenant's files by age, newest first unless told."""
    query = _alive(tenant_id, purpose)
    anchors = select(File).where(File.tenant_id == tenant_id)
    return page_by_age(session, query, File, after=after, limit=limit, order=order, anchors=anchors)


def delete_file(session: Session, *, tenant_id: uuid.UUID, file_id: uuid.UUID) -> File:
    """Forgets a file and drops its bytes; FileInUse while a job that has not ended needs it."""
    # FOR UPDATE waits for every pin_file; the jobs they made are then visible to the next statement.
    file = session.scalar(_alive(tenant_id, None).where(File.id == file_id).with_for_update(of=File))
    if file is None:
        raise FileNotFound
    user = session.scalar(
        select(Job.id)
        .where(or_(Job.training_file_id == file_id, Job.validation_file_id == file_id))
        .where(Job.state.not_in(TERMINAL))
        .limit(1)
    )
    if user is not None:
        raise FileInUse(job=public_id("ftjob", user))
    file.deleted_at = read_clock(session)
    session.flush()
    drop_refs(session, [file.blob_id])
    return file


def _alive(tenant_id: uuid.UUID, purpose: Purpose | None) -> Select[File]:
    query = select(File).where(File.tenant_id == tenant_id, File.deleted_at.is_(None))
    return query if purpose is None else query.where(File.purpose == purpose)
