"""One claimed job, as the threads of its slot share it: who it is, what there is to tell, and why to stop."""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack
from enum import StrEnum
from typing import TypeVar

from registry.errors import CancelRequested, FenceLost
from worker.errors import Drained
from worker.news import News

LOOK_SECONDS = 0.1
T = TypeVar("T")


class Stop(StrEnum):
    """Why an attempt must end early. Later members outrank earlier ones."""

    DETACHED = "detached"  # nobody was told for too long how it goes
    DRAIN = "drain"
    CANCEL = "cancel"
    LOST = "lost"


_RANK = list(Stop)
_ERRORS: dict[Stop, type[Exception]] = {
    Stop.DETACHED: Drained,
    Stop.DRAIN: Drained,
    Stop.CANCEL: CancelRequested,
    Stop.LOST: FenceLost,
}


class Attempt:
    """`fence` is the right to write; `is_trusted` says whether it is sure to be ours without asking."""

    def __init__(self, *, job_id: uuid.UUID, tenant_id: uuid.UUID, fence: int) -> None:
        self.job_id = job_id
        self.tenant_id = tenant_id
        self.fence = fence
        self.news = News()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._reason: Stop | None = None
        self._listeners: list[Callable[[Stop], None]] = []
        self._trusted_until = 0.0
        self._renewed = time.monotonic()
        self._held = ExitStack()

    def __str__(self) -> str:
        return f"job {self.job_id} (fence {self.fence})"

    def hold(self, resource: AbstractContextManager[None]) -> None:
        """Enter it now and leave it when the attempt is over."""
        self._held.enter_context(resource)

    def close(self) -> None:
        """The attempt is over: let go of what it held."""
        self._held.close()

    def stop(self, reason: Stop) -> None:
        """Ask the attempt to end. A child is told at once; code of this process sees it at its next `check`."""
        with self._lock:
            if self._reason is not None and _RANK.index(self._reason) >= _RANK.index(reason):
                return
            self._reason = reason
            self._stopped.set()
            listeners = list(self._listeners)
        for listener in listeners:
            listener(reason)

    def on_stop(self, listener: Callable[[Stop], None]) -> None:
        """Call `listener` with the reason when the attempt is stopped; at once if it already was."""
        with self._lock:
            self._listeners.append(listener)
            reason = self._reason
        if reason is not None:
            listener(reason)

    def check(self) -> None:
        """Raise FenceLost, CancelRequested or Drained if the attempt was asked to end."""
        if reason := self.reason:
            raise _ERRORS[reason]

    @property
    def reason(self) -> Stop | None:
        """Why the attempt was asked to end, if it was."""
        with self._lock:
            return self._reason

    def wait(self, seconds: float) -> None:
        """Sleep, unless the attempt is asked to end."""
        self._stopped.wait(seconds)
        self.check()

    def wait_for(self, answer: Future[T]) -> T:
        """Its result; if the attempt is asked to end before that, it is left to itself."""
        while wait([answer], timeout=LOOK_SECONDS).not_done:
            self.check()
        return answer.result()

    def trust(self, until: float) -> None:
        """The lease was renewed; it is ours until this moment of the monotonic clock."""
        self._trusted_until = until
        self._renewed = time.monotonic()

    def detached_seconds(self) -> float:
        """For how long Postgres has not answered."""
        return time.monotonic() - self._renewed

    def is_trusted(self) -> bool:
        return time.monotonic() < self._trusted_until
