"""One child process per job: spawned apart from us, listened to with caps, stopped in steps, its ending explained."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from worker.attempt import Attempt, Stop
from worker.errors import JobFailed
from worker.protocol import (
    EXIT_STOPPED,
    AnyMessage,
    CheckpointMessage,
    CheckpointNews,
    ErrorMessage,
    NoteMessage,
    PhaseMessage,
    ResultMessage,
    ResumedMessage,
    StepMessage,
    capped_lines,
    parse,
)

LOG_BYTES = 10 * 2**20
LOG_TAIL_BYTES = 4096
PIPE_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """How a child ended, and the last thing it said about it."""

    returncode: int
    verdict: ResultMessage | ErrorMessage | None
    log_tail: str


class Child:
    """A process that leads its own session. Its stdin is held open and never written: EOF tells it that we died."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], directory: Path) -> None:
        self._process = subprocess.Popen(
            list(argv),
            cwd=directory,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            umask=0o077,
        )
        self._lock = threading.Lock()
        self._reaped = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> IO[bytes]:
        return _opened(self._process.stdout)

    @property
    def stderr(self) -> IO[bytes]:
        return _opened(self._process.stderr)

    def terminate(self) -> None:
        """Ask the child to stop after its step."""
        self._process.send_signal(signal.SIGTERM)

    def drain(self) -> None:
        """Ask the child to save what it did up to the end of its step, and to stop."""
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """SIGKILL for the child and everything it started. No-op once it was waited for."""
        with self._lock:
            if not self._reaped:
                self._kill_group()

    def wait(self) -> int:
        """The exit code (negative: a signal). Nothing that the child started is left when this returns."""
        returncode = self._process.wait()
        with self._lock:
            self._kill_group()
            self._reaped = True
        return returncode

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # empty; or, on macOS, nothing but a zombie
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        for stream in (self._process.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()


def run_child(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    directory: Path,
    attempt: Attempt,
    grace_seconds: float,
    on_checkpoint: Callable[[CheckpointNews], None],
) -> Ending:
    """Run one child to its end, passing what it tells to `attempt.news`, and about checkpoints to `on_checkpoint`.

    Cancel sends SIGTERM, drain SIGUSR1, and both SIGKILL `grace_seconds` later; a lost fence SIGKILL at once."""
    child = Child(argv, env=env, directory=directory)
    log.info("%s: child %d started", attempt, child.pid)
    listener = _Listener(attempt, on_checkpoint)
    readers = [
        _start(lambda: listener.read(child.stdout), f"stdout-{child.pid}"),
        _start(lambda: _copy_log(child.stderr, directory / "log.txt"), f"stderr-{child.pid}"),
    ]
    stopper = _Stopper(child, grace_seconds)
    attempt.on_stop(stopper)
    try:
        returncode = child.wait()
    finally:
        stopper.close()
    for reader in readers:
        reader.join(PIPE_SECONDS)
    child.close()
    attempt.news.flush()
    log.info("%s: child %d ended with %d", attempt, child.pid, returncode)
    return Ending(returncode, listener.verdict, _tail(directory / "log.txt"))


def result_of(ending: Ending) -> ResultMessage:
    """The result of a child that succeeded; JobFailed, with its class, for every other ending."""
    if ending.returncode == 0 and isinstance(ending.verdict, ResultMessage):
        return ending.verdict
    if ending.returncode > 0 and isinstance(ending.verdict, ErrorMessage):
        raise JobFailed(ending.verdict.error_class, ending.verdict.code, ending.verdict.message)
    if ending.returncode == -signal.SIGKILL:
        why = "The training process was killed, most often because the machine ran out of memory. It is tried again."
        raise JobFailed("infra", "trainer_killed", why)
    if ending.returncode in (EXIT_STOPPED, -signal.SIGTERM):
        raise JobFailed("infra", "trainer_stopped", "Someone stopped the training process. It is tried again.")
    how = f"exit status {ending.returncode}" if ending.returncode >= 0 else f"signal {-ending.returncode}"
    why = f"The training process crashed ({how}); the worker's log has the details."
    raise JobFailed("bug", "trainer_crashed", why)


class _Listener:
    """Turns the child's messages into news; keeps its last verdict."""

    def __init__(self, attempt: Attempt, on_checkpoint: Callable[[CheckpointNews], None]) -> None:
        self._news = attempt.news
        self._on_checkpoint = on_checkpoint
        self.verdict: ResultMessage | ErrorMessage | None = None

    def read(self, stream: IO[bytes]) -> None:
        for line in capped_lines(stream):
            message = parse(line)
            if message is not None:
                self._hear(message)

    def _hear(self, message: AnyMessage) -> None:
        match message:
            case PhaseMessage():
                self._news.phase(message.phase, total_steps=message.total_steps)
            case StepMessage():
                self._news.step(message)
            case NoteMessage():
                self._news.note(message.message, level=message.level)
            case CheckpointMessage() | ResumedMessage():
                self._on_checkpoint(message)
            case ResultMessage() | ErrorMessage():
                self.verdict = message


class _Stopper:
    """What a child gets when its attempt is stopped: first a request, then no choice."""

    def __init__(self, child: Child, grace_seconds: float) -> None:
        self._child = child
        self._timer = threading.Timer(grace_seconds, child.kill)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._armed = False

    def __call__(self, reason: Stop) -> None:
        if reason is Stop.LOST:
            self._child.kill()
            return
        if reason is Stop.DRAIN:
            self._child.drain()
        else:
            self._child.terminate()
        with self._lock:
            if not self._armed:
                self._armed = True
                self._timer.start()

    def close(self) -> None:
        with self._lock:
            self._armed = True
            self._timer.cancel()


def _copy_log(stream: IO[bytes], path: Path) -> None:
    """Keep the first LOG_BYTES of what the child writes to stderr, and go on reading so that it never blocks."""
    room = LOG_BYTES
    with path.open("wb", buffering=0) as file:
        while chunk := os.read(stream.fileno(), 2**16):
            try:
                file.write(chunk[:room])
            except OSError:  # a full disk must not block the child
                room = 0
            room = max(0, room - len(chunk))


def _opened(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("the child was started without this pipe")
    return stream


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _start(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
