"""The outermost layer: limits that the server does not have, a name for every request, and one log line per request.

Pure ASGI, so that it sees a request before anything is parsed and a response as it leaves."""

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import refusals
from api.errors import respond, translate
from registry.errors import DepotError

MAX_BODY_BYTES = 2**20
MAX_URL_BYTES = 8 * 2**10
MAX_HEADERS, MAX_HEADER_BYTES, MAX_HEADERS_BYTES = 100, 8 * 2**10, 16 * 2**10
BODY_IDLE_SECONDS = 30.0

log = logging.getLogger("api.requests")


@dataclass
class Passage:
    """One request on its way through; `scope["state"]["passage"]`. A route that takes large bodies lifts the limit."""

    request_id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    started: float = field(default_factory=time.monotonic)
    body_limit: int = MAX_BODY_BYTES
    body_read: int = 0
    body_complete: bool = False
    status: int | None = None
    key_id: str | None = None


class Guard:
    """Refuses what must not reach the application, and turns what escapes from it into a 500 that says nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        passage = Passage()
        scope.setdefault("state", {})["passage"] = passage
        receive, send = _limited(scope, receive, passage), _marked(send, passage)
        try:
            check_head(scope)
            await self.app(scope, receive, send)
        except Exception as error:
            await _last_resort(error, scope, receive, send, passage)
        finally:
            log.info("request", extra=_facts(scope, passage))


def check_head(scope: Scope) -> None:
    """Refuses oversized or undecodable addresses and headers, and compressed bodies."""
    target = scope.get("raw_path", b"") + b"?" + scope["query_string"]
    if len(target) > MAX_URL_BYTES:
        raise refusals.UrlTooLong
    check_text(unquote_to_bytes(target))
    sizes = [len(name) + len(value) for name, value in scope["headers"]]
    if len(sizes) > MAX_HEADERS or sum(sizes) > MAX_HEADERS_BYTES or max(sizes, default=0) > MAX_HEADER_BYTES:
        raise refusals.HeadersTooLarge
    if Headers(scope=scope).get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
        raise refusals.UnsupportedEncoding


def check_text(data: bytes) -> None:
    """InvalidEncoding unless this is UTF-8 that Postgres can hold."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        raise refusals.InvalidEncoding from None
    if b"\0" in data:
        raise refusals.InvalidEncoding


def _limited(scope: Scope, receive: Receive, passage: Passage) -> Receive:
    """`receive` that refuses a body too large, before reading it where its length is declared, or too slow."""
    declared = Headers(scope=scope).get("content-length", "")

    async def limited() -> Message:
        if passage.body_complete:
            return await receive()  # waits for the client to leave, for as long as the response takes
        if declared.isdecimal() and int(declared) > passage.body_limit:
            raise refusals.BodyTooLarge(limit_bytes=passage.body_limit)
        try:
            async with asyncio.timeout(BODY_IDLE_SECONDS):
                message = await receive()
        except TimeoutError:
            raise refusals.BodyTimeout from None
        passage.body_read += len(message.get("body", b""))
        passage.body_complete = not message.get("more_body", False)
        if passage.body_read > passage.body_limit:
            raise refusals.BodyTooLarge(limit_bytes=passage.body_limit)
        return message

    return limited


def _marked(send: Send, passage: Passage) -> Send:
    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            passage.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = passage.request_id
            headers["x-content-type-options"] = "nosniff"
        await send(message)

    return marked


async def _last_resort(error: Exception, scope: Scope, receive: Receive, send: Send, passage: Passage) -> None:
    """Answers for an error that nobody else answered for; only a bug leaves a traceback."""
    if isinstance(error, ClientDisconnect):
        return  # in the middle of its own request; the line without a status says so
    known = translate(error)
    if passage.status is not None:
        # The head of the response is gone. The server sees an incomplete body and cuts the connection, which is
        # how the client learns; its length was announced.
        cause = translate(error.__cause__) if isinstance(error.__cause__, Exception) else None
        reason = getattr(known or cause, "code", type(error).__name__)
        log.error("response broken off", extra={"request_id": passage.request_id, "reason": reason})
        return
    if known is None:
        log.error("unexpected error", exc_info=error, extra={"request_id": passage.request_id})
    with contextlib.suppress(OSError):  # the client has gone
        await respond(known or DepotError())(scope, receive, send)


def _facts(scope: Scope, passage: Passage) -> dict[str, Any]:
    """What is logged of a request. The route's pattern, never the path or query: those can hold a signed token."""
    return {
        "request_id": passage.request_id,
        "method": scope["method"][:16],
        "route": getattr(scope.get("route"), "path", None),
        "status": passage.status,
        "ms": round((time.monotonic() - passage.started) * 1000, 1),
        "bytes_in": passage.body_read,
        "key_id": passage.key_id,
    }
