"""`/v1/files`, as OpenAI's clients know it. A training file is checked row by row before it is accepted."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import Query, Request, Response

from api.context import DepotDep, PrincipalDep, SessionDep, StoreDep
from api.downloads import send_object
from api.openai.schemas import FileDeleted, FileObject
from api.openai.upload import PURPOSES, Upload, UploadDep
from api.refusals import InvalidMultipart, InvalidRange, InvalidValue, MissingField, RangeNotSatisfiable, UnknownField
from api.routing import Permission, Router
from api.schemas import Listing, listing, unix
from lora_core.rows import MAX_LINE_BYTES, validate_rows
from registry import errors
from registry.blobs import store_file
from registry.db import transaction
from registry.files import Purpose, create_file, delete_file, get_file, list_files
from registry.ids import parse_id, public_id
from registry.models import File

router = Router("Files")
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": PURPOSES}},
}


@router.declare(
    "POST",
    "/files",
    permission=Permission.FILES_WRITE,
    summary="Upload a file",
    returns=FileObject,
    raises=(
        InvalidMultipart,
        UnknownField,
        MissingField,
        InvalidValue,
        errors.InvalidFilename,
        errors.InvalidTrainingFile,
        errors.FileTooLarge,
        errors.StorageUnavailable,
    ),
    extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
)
def upload_file(upload: UploadDep, depot: DepotDep, principal: PrincipalDep) -> FileObject:
    """`fine-tune`: JSON lines, `{"messages": […]}` or `{"prompt", "completion"}`, each checked now; the answer to a
    bad file lists its first 20 faults by line. `base-model`: one file of a base model, registered afterwards."""
    report = check_rows(upload) if upload.purpose == "fine-tune" else None
    # The bytes are stored under a row of their own first; no transaction stays open while they move.
    blob_id = store_file(
        depot.sessions,
        depot.store,
        upload.path,
        sha256=upload.sha256,
        size=upload.size,
        tenant_id=principal.tenant_id,
    )
    with transaction(depot.sessions) as session:
        file = create_file(
            session,
            tenant_id=principal.tenant_id,
            blob_id=blob_id,
            filename=upload.filename,
            purpose=upload.purpose,
            report=report,
        )
        return file_object(get_file(session, tenant_id=principal.tenant_id, file_id=file.id))


@router.declare(
    "GET",
    "/files",
    permission=Permission.FILES_READ,
    summary="List files",
    returns=Listing[FileObject],
    raises=(errors.InvalidCursor,),
)
def files(
    *,
    session: SessionDep,
    principal: PrincipalDep,
    purpose: Purpose | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    order: Literal["asc", "desc"] = "desc",
) -> Listing[FileObject]:
    """Your files by age, newest first."""
    cursor = None
    if after is not None and (cursor := parse_id("file", after)) is None:
        raise errors.InvalidCursor(param="after")
    page = list_files(session, tenant_id=principal.tenant_id, purpose=purpose, after=cursor, limit=limit, order=order)
    items = [file_object(file) for file in page.items]
    return listing(FileObject, items, has_more=page.has_more, cursor=lambda file: file.id)


@router.declare(
    "GET",
    "/files/{file_id}",
    permission=Permission.FILES_READ,
    summary="Read a file's facts",
    returns=FileObject,
    raises=(errors.FileNotFound,),
)
def file(file_id: str, session: SessionDep, principal: PrincipalDep) -> FileObject:
    """One file. `report` says what its check found."""
    return file_object(get_file(session, tenant_id=principal.tenant_id, file_id=_file_id(file_id)))


@router.declare(
    "DELETE",
    "/files/{file_id}",
    permission=Permission.FILES_WRITE,
    summary="Delete a file",
    returns=FileDeleted,
    raises=(errors.FileNotFound, errors.FileInUse),
)
def remove_file(file_id: str, session: SessionDep, principal: PrincipalDep) -> FileDeleted:
    """Forgets a file. One that an unfinished job needs stays."""
    gone = delete_file(session, tenant_id=principal.tenant_id, file_id=_file_id(file_id))
    return FileDeleted(id=public_id("file", gone.id))


@router.declare(
    "GET",
    "/files/{file_id}/content",
    permission=Permission.FILES_READ,
    summary="Download a file",
    raises=(errors.FileNotFound, InvalidRange, RangeNotSatisfiable, errors.ArtifactCorrupt, errors.StorageUnavailable),
    response_class=Response,
    responses={
        200: {"description": "The bytes", "content": {"application/octet-stream": {"example": '{"messages": []}'}}},
        206: {"description": "The bytes of one `Range`", "content": {"application/octet-stream": {"example": "{"}}},
    },
)
def content(file_id: str, request: Request, session: SessionDep, store: StoreDep, principal: PrincipalDep) -> Response:
    """The bytes as they were uploaded, or one `Range` of them."""
    found = get_file(session, tenant_id=principal.tenant_id, file_id=_file_id(file_id))
    blob = found.blob
    return send_object(
        store, key=blob.key, sha256=blob.sha256, size=blob.size, filename=found.filename, headers=request.headers
    )


def file_object(file: File) -> FileObject:
    """A file row as clients see it."""
    return FileObject(
        id=public_id("file", file.id),
        bytes=file.blob.size,
        created_at=unix(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        sha256=file.blob.sha256,
        report=file.report,
    )


def check_rows(upload: Upload) -> dict[str, Any]:
    """What the check of a training file found; InvalidTrainingFile with the first 20 faults by line."""
    with Path(upload.path).open("rb") as source:
        report = validate_rows(bounded_lines(source))
    if not report.errors:
        return {"rows": report.rows, "kind": report.kind}
    first = report.errors[0]
    place = f"line {first.line}" + (f" at {first.pointer}" if first.pointer else "")
    raise errors.InvalidTrainingFile(
        f"The training file cannot be used: {place}: {first.message}",
        param="file",
        errors=[{"line": e.line, "pointer": e.pointer, "message": e.message} for e in report.errors],
    )


def bounded_lines(source: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, each cut behind the longest that is allowed: one endless line must not fill memory."""
    while line := source.readline(MAX_LINE_BYTES + 2):
        yield line
        while line and not line.endswith(b"\n"):
            line = source.readline(MAX_LINE_BYTES)


def _file_id(text: str) -> uuid.UUID:
    if (found := parse_id("file", text)) is None:
        raise errors.FileNotFound
    return found
