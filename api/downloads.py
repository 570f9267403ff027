"""Bytes from the store to a client: whole or one range, and never a complete copy of something corrupt."""

import hashlib
import re
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from api.errors import respond
from api.refusals import InvalidRange, RangeNotSatisfiable
from registry.errors import ArtifactCorrupt
from registry.storage import ObjectStore
from registry.storage.links import CONTENT_TYPE, attachment

_RANGE = re.compile(r"bytes=(?P<first>[0-9]*)-(?P<last>[0-9]*)", re.ASCII)


def send_object(
    store: ObjectStore, *, key: str, sha256: str, size: int, filename: str, headers: Headers, head: bool = False
) -> Response:
    """The answer to a request with these headers for one stored object.

    A whole object is hashed as it goes, and its last chunk is held back until the digest is right: a corrupt one
    breaks off, which `Content-Length` shows. A range cannot be checked; `ETag` is the digest it should be part of."""
    if store.stat(key).size != size:
        raise ArtifactCorrupt(key=key)
    answer = answer_for(headers, etag=f'"{sha256}"', size=size, filename=filename)
    if isinstance(answer, Response):
        return answer
    answer.headers["x-depot-sha256"] = sha256
    if head:
        return answer.without_body()
    whole = answer.status == 200
    chunks = verified(store.open(key), sha256) if whole else store.open(key, start=answer.start, end=answer.end)
    return StreamingResponse(chunks, status_code=answer.status, headers=answer.headers, media_type=CONTENT_TYPE)


@dataclass(frozen=True)
class Answer:
    """How to answer a request for a file: with its bytes from `start` to `end`."""

    status: int
    start: int
    end: int
    headers: dict[str, str]

    def without_body(self) -> Response:
        """What HEAD gets."""
        return Response(status_code=self.status, headers=self.headers, media_type=CONTENT_TYPE)


def answer_for(headers: Headers, *, etag: str, size: int, filename: str) -> Answer | Response:
    """What a request with these headers gets of a file of so many bytes; a response if none of them: 304 or 416.

    `If-Range` with another validator asks for everything, as does more than one range."""
    common = {
        "etag": etag,
        "accept-ranges": "bytes",
        "content-disposition": attachment(filename),
        "cache-control": "private, no-store",
        "x-depot-size": str(size),
    }
    if _names(headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=common)
    wanted = headers.get("range") if headers.get("if-range", etag) == etag else None
    found = parse_range(wanted, size) if wanted is not None else None
    if found == (size, size):
        return respond(RangeNotSatisfiable(param="Range"), {"content-range": f"bytes */{size}"})
    start, end = found or (0, size)
    common["content-length"] = str(end - start)
    if found is not None:
        common["content-range"] = f"bytes {start}-{end - 1}/{size}"
    return Answer(206 if found is not None else 200, start, end, common)


def _names(header: str | None, etag: str) -> bool:
    """Whether a list of validators, strong or weak, holds this one."""
    candidates = [item.strip() for item in (header or "").split(",")]
    return bool({"*", etag, f"W/{etag}"} & set(candidates))


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """[start, end) of a `Range` header, clamped; (size, size) when it starts behind the end.

    None for several ranges at once, which may be answered with everything; InvalidRange for what is none."""
    if text.startswith("bytes=") and "," in text:
        return None
    match = _RANGE.fullmatch(text.strip())
    if match is None or not (match["first"] or match["last"]) or len(text) > 64:
        raise InvalidRange(param="Range")
    if not match["first"]:
        count = int(match["last"])
        return (max(0, size - count), size) if count and size else (size, size)
    first = int(match["first"])
    if match["last"] and int(match["last"]) < first:
        raise InvalidRange(param="Range")
    if first >= size:
        return size, size
    return first, min(size, int(match["last"]) + 1) if match["last"] else size


def verified(chunks: Generator[bytes, None, None], sha256: str) -> Iterator[bytes]:
    """The chunks, the last of them only if all together are what `sha256` says; ArtifactCorrupt otherwise."""
    digest, held = hashlib.sha256(), b""
    with closing(chunks):
        for chunk in chunks:
            digest.update(chunk)
            if held:
                yield held
            held = chunk
    if digest.hexdigest() != sha256:
        raise ArtifactCorrupt
    if held:
        yield held
