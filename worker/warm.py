"""Training processes between two jobs: each keeps the base of its last job in memory, for the next on the same base.

A process serves one tenant only: whatever the data of one tenant did to it ends with it."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from worker.process import Child

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Warmth:
    """What a process must have in common with a task."""

    tenant_id: uuid.UUID
    base_digest: str
    quantization: str | None = None  # a base in 4 bits is another base


@dataclass(frozen=True)
class _Idle:
    warmth: Warmth
    child: Child
    since: float
    resident_bytes: int


class WarmPool:
    """Never more training processes than `slots`, busy ones included; idle ones hold at most `max_bytes` together,
    none for longer than `idle_seconds`."""

    def __init__(self, *, slots: int, max_bytes: int, idle_seconds: float) -> None:
        self._slots = slots
        self._max_bytes = max_bytes
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._idle: list[_Idle] = []  # the one that waits longest is first
        self._busy = 0
        self._closed = False

    @property
    def keeps(self) -> bool:
        """Whether a process may wait for another task at all."""
        return self._max_bytes > 0

    @contextmanager
    def borrow(self, warmth: Warmth, start: Callable[[], Child]) -> Iterator[Child]:
        """An idle process that has this base loaded, or else a new one. Afterwards it is kept if it offers that and
        nothing was raised; else it is ended."""
        child = self._take(warmth)
        try:
            child = child or start()
        except BaseException:
            self._give_back(None)
            raise
        try:
            yield child
        except BaseException:
            self._give_back(None)
            child.end()
            raise
        ready = child.ready
        idle = _Idle(warmth, child, time.monotonic(), ready.resident_bytes) if ready else None
        self._give_back(idle)
        if idle is None:
            child.end()

    def evict(self) -> None:
        """End those that waited too long, or died meanwhile."""
        latest = time.monotonic() - self._idle_seconds
        with self._lock:
            gone = [idle for idle in self._idle if idle.since < latest or idle.child.ready is None]
            self._idle = [idle for idle in self._idle if idle not in gone]
        _end(gone)

    def clear(self) -> bool:
        """End all that are idle now, and answer whether there were any: somebody needs their memory."""
        with self._lock:
            gone, self._idle = self._idle, []
        _end(gone)
        return bool(gone)

    def close(self) -> None:
        """End all that are idle, now and from now on."""
        with self._lock:
            self._closed = True
        self.clear()

    def _take(self, warmth: Warmth) -> Child | None:
        with self._lock:
            self._busy += 1
            fitting = [idle for idle in self._idle if idle.warmth == warmth and idle.child.ready]
            if fitting:
                self._idle.remove(fitting[-1])
            gone = self._surplus()
        _end(gone)
        return fitting[-1].child if fitting else None

    def _give_back(self, idle: _Idle | None) -> None:
        with self._lock:
            self._busy -= 1
            if idle is not None:
                self._idle.append(idle)
            gone = self._surplus()
        _end(gone)

    def _surplus(self) -> list[_Idle]:
        """Those that must make room, taken out of the list: the ones that waited longest."""
        gone = []
        while self._idle and (self._closed or self._is_too_much()):
            gone.append(self._idle.pop(0))
        return gone

    def _is_too_much(self) -> bool:
        resident = sum(idle.resident_bytes for idle in self._idle)
        return len(self._idle) + self._busy > self._slots or resident > self._max_bytes


def _end(gone: list[_Idle]) -> None:
    for idle in gone:
        log.info("child %d is ended: its base is not needed, or has no room", idle.child.pid)
        idle.child.end()
