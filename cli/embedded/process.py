"""One child process: how to start it, when it counts as ready, how to stop it."""

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# The folder that holds `cli`, `api`, `worker` and `alembic.ini`.
ROOT = Path(__file__).resolve().parents[2]
REPORT_THEN_EXEC = 'echo "+$$ $1" >&0; shift; exec "$@" </dev/null'
LOG_TAIL_LINES = 12
LOG_KEEP_BYTES = 16 * 2**20


class EmbeddedError(RuntimeError):
    """The embedded stack cannot run here. The message is for the person at the terminal."""


def always_ready() -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """A child as data, so that the supervisor can start it again exactly as the first time."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    ready: Callable[[], bool] = always_ready
    ready_seconds: float = 60.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 10.0


@dataclass(frozen=True)
class Server:
    """A started server that answers at `url`."""

    url: str
    spec: ChildSpec
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        stop(self.spec, self.process)


def spawn(spec: ChildSpec, *, guardian: int | None = None, capture: bool = False) -> subprocess.Popen[bytes]:
    """Starts `spec` in a session of its own, so that Ctrl-C reaches the supervisor alone.

    `guardian` is the guardian's pipe: the child reports itself there before it becomes the program, so that
    there is no moment at which it could be forgotten. `capture` gives stdout to the caller, not to the log."""
    argv = list(spec.argv)
    if guardian is not None:
        argv = ["sh", "-c", REPORT_THEN_EXEC, "sh", str(int(spec.stop_signal)), *argv]
    with open_log(spec.log) as log:
        return subprocess.Popen(
            argv,
            env=dict(spec.env),
            cwd=ROOT,  # `python -m` looks in the working directory first: it must not be a stranger's
            stdin=subprocess.DEVNULL if guardian is None else guardian,
            stdout=subprocess.PIPE if capture else log,
            stderr=log,
            start_new_session=True,
            umask=0o077,
        )


def open_log(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def start(spec: ChildSpec, *, url: str) -> Server:
    """Starts `spec` and returns once it is ready; raises EmbeddedError, nothing left running, if never."""
    process = spawn(spec)
    try:
        wait_ready(spec, process)
    except BaseException:
        stop(spec, process)
        raise
    return Server(url, spec, process)


def wait_ready(spec: ChildSpec, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + spec.ready_seconds
    while not spec.ready():
        if process.poll() is not None:
            how = ending(process.returncode)
            raise EmbeddedError(f"{spec.name} ended before it was ready ({how}).\n{tail(spec.log)}")
        if time.monotonic() > deadline:
            raise EmbeddedError(f"{spec.name} did not become ready in {spec.ready_seconds:.0f} s.\n{tail(spec.log)}")
        time.sleep(0.02)


def stop(spec: ChildSpec, process: subprocess.Popen[bytes]) -> None:
    """Asks with the child's own stop signal, then insists. Returns when the child is gone."""
    if process.poll() is None:
        process.send_signal(spec.stop_signal)
        try:
            process.wait(spec.stop_seconds)
        except subprocess.TimeoutExpired:
            kill_group(process.pid)
    process.wait()


def kill_group(pid: int) -> None:
    """SIGKILL to the session that `spawn` gave the child; no error when nothing of it is left."""
    # macOS answers EPERM for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether `pid` runs. A zombie does not: in a container nobody may ever reap it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # The name in parentheses may itself hold spaces and parentheses; the state follows the last one.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self").exists()


def ending(returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"


def tail(log: Path) -> str:
    """The end of a log, for an error message; says what it means when the disk is full."""
    try:
        text = log.read_bytes()[-8192:].decode(errors="replace")
    except OSError as error:
        return f"(cannot read {log}: {error})"
    lines = [f"  {line}" for line in text.splitlines()[-LOG_TAIL_LINES:]]
    return "\n".join([f"The end of {log}:", *lines]) + advice(text)


def advice(text: str) -> str:
    """What to do about the one failure that every program words alike; else nothing."""
    if os.strerror(errno.ENOSPC) not in text:
        return ""
    return "\nThe disk is full: free some space, then run the command again."


def rotate(log: Path) -> None:
    """Keeps one older log, so that a stack that is restarted for years does not fill the disk."""
    if log.exists() and log.stat().st_size > LOG_KEEP_BYTES:
        log.replace(log.with_suffix(".log.1"))
