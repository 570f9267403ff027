"""One line in the log when something stops answering and one when it answers again; patience in between."""

import logging
import random
from collections.abc import Callable
from typing import TypeVar

from registry.apart import run_apart
from worker.attempt import Attempt
from worker.errors import is_outage

log = logging.getLogger(__name__)
T = TypeVar("T")


class Outage:
    """The state of one thing that may be away, and how long to wait before trying it again."""

    def __init__(self, what: str, *, first_seconds: float = 0.5, longest_seconds: float = 30.0) -> None:
        self._what = what
        self._first = first_seconds
        self._longest = longest_seconds
        self._failures = 0

    def failed(self, error: Exception) -> float:
        """Take note of a failure; returns the seconds to wait, twice as long each time."""
        if self._failures == 0:
            if is_outage(error):
                log.warning("%s: %s; trying again quietly", self._what, _first_line(error))
            else:
                log.error("%s failed; trying again quietly", self._what, exc_info=error)
        seconds = min(self._longest, self._first * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return seconds * random.uniform(0.75, 1.0)  # noqa: S311 - jitter, not a secret

    def worked(self) -> None:
        if self._failures:
            log.info("%s works again after %d failures", self._what, self._failures)
        self._failures = 0


def persist(call: Callable[[], T], pause: Callable[[float], None], what: str) -> T:
    """The result of `call`, repeated through outages until it works. `pause` waits, and may raise to give up."""
    outage = Outage(what)
    while True:
        try:
            result = call()
        except Exception as error:
            if not is_outage(error):
                raise
            pause(outage.failed(error))
        else:
            outage.worked()
            return result


def transfer(call: Callable[[], T], attempt: Attempt, what: str) -> T:
    """The result of `call`, which asks the object store, repeated through outages.

    It runs in a thread of its own, because a store that swallows everything answers nobody for minutes: when the
    attempt is asked to end, it is left to fail by itself."""
    return persist(lambda: attempt.wait_for(run_apart(call, what)), attempt.wait, what)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
