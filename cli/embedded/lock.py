"""One stack per home: a lock that lives exactly as long as the stack does, clean-up included."""

import fcntl
import os
import time
from collections.abc import Callable

from cli.embedded.process import EmbeddedError, is_alive
from cli.home import Home, read_json

# Longer than a guardian may take: five seconds for each child to stop, five more to be killed.
CLEANING_SECONDS = 60.0


class AlreadyRunning(EmbeddedError):
    """Another supervisor holds this home."""


def lock_home(home: Home, say: Callable[[str], None]) -> int:
    """The lock's file descriptor; raises AlreadyRunning. Waits for the clean-up after a killed supervisor."""
    descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + CLEANING_SECONDS
    told = False
    while not _locked(descriptor):
        _refuse_if_running(home)
        if time.monotonic() > deadline:
            raise EmbeddedError(f"{home.root} is still locked by an earlier run. See {home.log('guardian')}.")
        if not told:
            say("Waiting for an earlier run to finish cleaning up …")
            told = True
        time.sleep(0.1)
    return descriptor


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refuse_if_running(home: Home) -> None:
    state = read_json(home.state)
    pid, url = state.get("pid"), state.get("url")
    if isinstance(pid, int) and is_alive(pid):
        where = f"running at {url}" if url else "starting"
        raise AlreadyRunning(f"lora-depot is already {where} on {home.root} (pid {pid}).")
