"""Places where tests break a process on purpose: `DEPOT_FAILPOINTS="pub.before_commit=kill9@2;pub.hashed=raise"`.

An action happens at every hit, or with `@n` at the n-th only: `kill9` and `stop` (SIGSTOP) send that signal to this
process, `exit` ends it without cleaning up, `sleep:SECONDS` delays, `raise` fails the way an outage does. Right after
a commit, `raise` is an answer that got lost: what was asked for is done, and the caller sees an error."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

from registry.errors import Unavailable

EXIT_STATUS = 70

log = logging.getLogger(__name__)


class _Failpoint:
    def __init__(self, name: str, act: Callable[[], None], nth: int | None) -> None:
        self._name = name
        self._act = act
        self._nth = nth
        self._hits = 0
        self._lock = threading.Lock()

    def reach(self) -> None:
        with self._lock:
            self._hits += 1
            due = self._nth is None or self._hits == self._nth
        if due:
            log.warning("failpoint %s", self._name)
            self._act()


_armed: dict[str, _Failpoint] = {}


def hit(name: str) -> None:
    """The process has come to this place. Nothing happens unless it is armed."""
    if (point := _armed.get(name)) is not None:
        point.reach()


def arm(text: str) -> None:
    """Replaces what is armed by what `text` says; ValueError if it says nothing that can be understood."""
    parsed = dict(_parse(entry) for entry in text.split(";") if entry.strip())
    _armed.clear()
    _armed.update(parsed)


def _parse(entry: str) -> tuple[str, _Failpoint]:
    name, equals, rest = entry.strip().partition("=")
    word, at, count = rest.partition("@")
    if not name or not equals or (at and not (count.isdecimal() and int(count))):
        raise ValueError(f"not a failpoint: {entry!r}")
    return name, _Failpoint(name, _action(word), int(count) if at else None)


def _action(word: str) -> Callable[[], None]:
    verb, _, argument = word.partition(":")
    if verb == "sleep":
        seconds = float(argument)
        return lambda: time.sleep(seconds)
    if word not in _ACTIONS:
        raise ValueError(f"not an action of a failpoint: {word!r}")
    return _ACTIONS[word]


def _fail() -> None:
    raise Unavailable("A test made this fail.")


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    # To this thread, which then goes no further: a signal to the process may reach another one first.
    "stop": lambda: signal.pthread_kill(threading.get_ident(), signal.SIGSTOP),
    "exit": lambda: os._exit(EXIT_STATUS),
    "raise": _fail,
}
