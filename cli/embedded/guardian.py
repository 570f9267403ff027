"""Outlives a supervisor that was killed with SIGKILL and ends what it left running.

Run as `python -m cli.embedded.guardian` with the supervisor's pipe as standard input. The lines are `+pid signal`
for each child that starts and `-pid` for each that was seen to end. The pipe closes when the supervisor is gone.
The inherited lock keeps the home closed to a new supervisor until this process has finished."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable

from cli.embedded.process import is_alive, kill_group

GRACE_SECONDS = 5.0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    children = follow(sys.stdin)
    # The last to start stands on those before it.
    for pid in reversed(children):
        end(pid, children[pid])


def follow(lines: Iterable[str]) -> dict[int, signal.Signals]:
    """Reads until the supervisor is gone; returns what still runs, in the order it was started."""
    children: dict[int, signal.Signals] = {}
    for line in lines:
        pid = int(line[1:].split()[0])
        if line.startswith("+"):
            children[pid] = signal.Signals(int(line.split()[1]))
        else:
            children.pop(pid, None)
    return children


def end(pid: int, stop_signal: signal.Signals) -> None:
    """Asks one child to stop, waits a little, then kills its whole session."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, stop_signal)
    if not _gone_within(pid, GRACE_SECONDS):
        kill_group(pid)
        _gone_within(pid, GRACE_SECONDS)
    kill_group(pid)


def _gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


if __name__ == "__main__":
    main()
