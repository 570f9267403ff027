"""Server-sent events: lines for a stream, and how many streams one key may hold open."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import translate
from api.refusals import TooManyStreams

STREAMS_PER_KEY = 8
POLL_SECONDS, COMMENT_SECONDS = 1.0, 15.0
# A client comes back by itself; a key that was revoked meanwhile does not.
LIFETIME_SECONDS = 15 * 60.0
MEDIA_TYPE = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Told:
    """One event: its place in the stream, its type, and JSON on one line."""

    number: int
    type: str
    data: str


@dataclass(frozen=True, slots=True)
class News:
    """What is new since a number; `more` may follow at once; after `ended` nothing will."""

    events: Sequence[Told]
    more: bool
    ended: bool


class StreamLimit:
    """Counts the streams that each key holds open in this process."""

    def __init__(self, per_key: int = STREAMS_PER_KEY) -> None:
        self._per_key = per_key
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()

    def take(self, key_id: str) -> None:
        """TooManyStreams when this key holds as many as it may."""
        with self._lock:
            if self._open[key_id] >= self._per_key:
                raise TooManyStreams(limit=self._per_key)
            self._open[key_id] += 1

    def give_back(self, key_id: str) -> None:
        with self._lock:
            self._open[key_id] -= 1
            if not self._open[key_id]:
                del self._open[key_id]


class EventStream(StreamingResponse):
    """A stream that gives its place back however it ends, even if it never began."""

    def __init__(self, lines: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        # Proxies that buffer would hold events back.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(lines, media_type=MEDIA_TYPE, headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def event_lines(
    read: Callable[[int], News],
    after: int,
    *,
    prefix: str,
    poll_seconds: float = POLL_SECONDS,
    comment_seconds: float = COMMENT_SECONDS,
    lifetime_seconds: float = LIFETIME_SECONDS,
) -> AsyncIterator[str]:
    """The events behind `after` as they come, until the end, with a comment now and then to keep the line open.

    `read` runs in a thread and holds nothing between two calls; while the database is away the stream waits."""
    started = told = time.monotonic()
    yield "retry: 2000\n\n"
    while time.monotonic() - started < lifetime_seconds:
        news = await run_in_threadpool(_read, read, after)
        for event in news.events:
            yield f"id: {prefix}{event.number}\nevent: {event.type}\ndata: {event.data}\n\n"
            after, told = event.number, time.monotonic()
        if news.more:
            continue
        if news.ended:
            return
        if time.monotonic() - told >= comment_seconds:
            yield ": still here\n\n"
            told = time.monotonic()
        await asyncio.sleep(poll_seconds)


def _read(read: Callable[[int], News], after: int) -> News:
    try:
        return read(after)
    except Exception as error:
        if translate(error) is None:
            raise
        return News([], more=False, ended=False)


def stream_example(event: Any) -> dict[str, Any]:
    """How a stream is shown in the OpenAPI document."""
    return {"description": "The stream", "content": {MEDIA_TYPE: {"example": event}}}
