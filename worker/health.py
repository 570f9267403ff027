"""`python -m worker.health`: exit status 0 while a worker of this host shows that its slots and chores go on.

A worker sets the time of a file; nothing else is asked, so that an outage of Postgres or Redis restarts no worker."""

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from registry.settings import Settings

SUFFIX = ".pulse"
FRESH_SECONDS = 60.0
PULSE_SECONDS = 10.0


def pulse(path: Path, is_well: Callable[[], bool]) -> Callable[[], None]:
    """A chore that renews the file as long as all is well."""

    def beat() -> None:
        if is_well():
            path.touch()

    return beat


def is_fresh(work_dir: Path, *, host: str, now: float) -> bool:
    """Whether a worker of this host renewed its file lately."""
    pulses = [path.stat().st_mtime for path in work_dir.glob(f"{host}-*{SUFFIX}")]
    return any(now - at < FRESH_SECONDS for at in pulses)


if __name__ == "__main__":
    sys.exit(0 if is_fresh(Settings().work_dir, host=socket.gethostname(), now=time.time()) else 1)
