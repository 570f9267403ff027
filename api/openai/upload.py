"""Receiving one file of any size: streamed to disk and hashed on the way, never held in memory."""

import hashlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, cast

from fastapi import Depends, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from api.context import Depot, DepotDep
from api.guard import check_text
from api.refusals import InvalidMultipart, InvalidValue, MissingField, UnknownField, UnsupportedMediaType
from registry.errors import FileTooLarge
from registry.files import Purpose
from registry.settings import Settings

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PURPOSES = ("fine-tune", "base-model")
FORM_BYTES = 64 * 2**10  # what may surround the file
_MAX_FIELD_BYTES = 256
_WRITE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Upload:
    """A file on local disk, gone when the request ends."""

    path: Path
    filename: str
    purpose: Purpose
    sha256: str
    size: int


def upload_folder(settings: Settings) -> Path:
    """Where uploads lie between the socket and the store."""
    return settings.work_dir / "uploads"


def limit_of(purpose: str | None, settings: Settings) -> int:
    """The largest file of this purpose; of any, while it is not known."""
    limits = {"fine-tune": settings.max_file_bytes, "base-model": settings.max_base_file_bytes}
    return limits.get(purpose or "", max(limits.values()))


@dataclass
class Form:
    """What the parser has seen: the small fields, and bytes of the file that are not written yet."""

    fields: dict[str, bytes] = field(default_factory=dict)
    filename: str | None = None
    pending: bytearray = field(default_factory=bytearray)
    _header: list[bytes] = field(default_factory=lambda: [b"", b""])
    _name: str = ""

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._check_part,
            "on_part_data": self._data,
        }

    @property
    def purpose(self) -> str | None:
        value = self.fields.get("purpose")
        return value.decode("utf-8", "replace") if value is not None else None

    def _begin(self) -> None:
        self._name = ""

    def _add_header(self, part: int, data: bytes) -> None:
        self._header[part] += data

    def _end_header(self) -> None:
        name, value = self._header
        self._header = [b"", b""]
        if name.lower() != b"content-disposition":
            return
        _, options = parse_options_header(value)
        check_text(options.get(b"name", b"") + options.get(b"filename", b""))
        self._name = options.get(b"name", b"").decode()
        if self._name == "file":
            if self.filename is not None:
                raise InvalidMultipart("The form has more than one `file`. Send one file per request.", param="file")
            self.filename = options.get(b"filename", b"").decode() or "upload"

    def _check_part(self) -> None:
        if self._name not in {"file", "purpose"}:
            name = self._name[:80]
            raise UnknownField(f"{name!r} is not a field here. Allowed: file, purpose.", param=name)
        if self._name == "purpose":
            self.fields["purpose"] = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.pending += data[start:end]
            return
        self.fields[self._name] += data[start:end]
        if len(self.fields[self._name]) > _MAX_FIELD_BYTES:
            raise InvalidMultipart(f"The field `{self._name}` is too long.", param=self._name)


async def receive_upload(request: Request, depot: DepotDep) -> AsyncIterator[Upload]:
    """The file of a multipart request; the route that depends on it runs when all of it is on disk."""
    request.state.passage.body_limit = limit_of(None, depot.settings) + FORM_BYTES
    folder = upload_folder(depot.settings)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        yield await _receive(request, depot, cast(BinaryIO, file), Path(file.name))


UploadDep = Annotated[Upload, Depends(receive_upload)]


async def _receive(request: Request, depot: Depot, file: BinaryIO, path: Path) -> Upload:
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    if media_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise UnsupportedMediaType("Send the file as multipart/form-data with the fields `file` and `purpose`.")
    form, digest = Form(), hashlib.sha256()
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        async for chunk in request.stream():
            parser.write(chunk)
            if file.tell() + len(form.pending) > (limit := limit_of(form.purpose, depot.settings)):
                raise FileTooLarge(param="file", limit_bytes=limit)
            if len(form.pending) >= _WRITE_BYTES:
                await run_in_threadpool(_drain, form, file, digest)
        parser.finalize()
    except FormParserError:
        raise InvalidMultipart from None
    await run_in_threadpool(_drain, form, file, digest)
    purpose = _complete(form)
    if file.tell() > (limit := limit_of(purpose, depot.settings)):
        raise FileTooLarge(param="file", limit_bytes=limit)
    return Upload(path, form.filename or "upload", purpose, digest.hexdigest(), file.tell())


def _drain(form: Form, file: BinaryIO, digest: "hashlib._Hash") -> None:
    digest.update(form.pending)
    file.write(form.pending)
    file.flush()
    form.pending.clear()


def _complete(form: Form) -> Purpose:
    if form.filename is None:
        raise MissingField("Add the form field `file`.", param="file")
    purpose = form.purpose
    if purpose is None:
        raise MissingField(f"Add the form field `purpose`: one of {', '.join(PURPOSES)}.", param="purpose")
    if purpose not in PURPOSES:
        raise InvalidValue(f"`purpose` must be one of {', '.join(PURPOSES)}.", param="purpose")
    return cast(Purpose, purpose)
