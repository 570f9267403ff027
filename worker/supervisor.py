"""One task in one child: given to it, watched, stopped in steps, its ending explained."""

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker.attempt import Attempt, Stop
from worker.errors import JobFailed
from worker.process import LOG_FILE, Child
from worker.protocol import (
    EXIT_STOPPED,
    AnyMessage,
    CheckpointMessage,
    CheckpointNews,
    ErrorMessage,
    NoteMessage,
    PhaseMessage,
    ReadyMessage,
    ResultMessage,
    ResumedMessage,
    StepMessage,
)

LOG_TAIL_BYTES = 4096
LOOK_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """How a child ended (None: it lives, ready for another task), and the last thing it said about its task.

    `heard` is false for a child that never said anything about it."""

    returncode: int | None
    verdict: ResultMessage | ErrorMessage | None
    log_tail: str
    heard: bool = True


def run_child(
    child: Child,
    workspace: Path,
    *,
    attempt: Attempt,
    grace_seconds: float,
    on_checkpoint: Callable[[CheckpointNews], None],
) -> Ending:
    """Have the child do the task in `workspace`, passing what it tells to `attempt.news`, and about checkpoints to
    `on_checkpoint`.

    Cancel sends SIGTERM, drain SIGUSR1, and both SIGKILL `grace_seconds` later; a lost fence SIGKILL at once."""
    log.info("%s: child %d begins its task %d", attempt, child.pid, child.tasks + 1)
    listener = _Listener(attempt, on_checkpoint)
    child.assign(workspace, listener.hear)
    stopper = _Stopper(child, grace_seconds)
    attempt.on_stop(stopper)
    try:
        while not child.wait(LOOK_SECONDS):
            pass
    finally:
        stopper.close()
    attempt.news.flush()
    log.info("%s: child %d %s", attempt, child.pid, "is ready again" if child.ready else f"ended: {child.returncode}")
    return Ending(child.returncode, listener.verdict, _tail(workspace / LOG_FILE), listener.heard)


def result_of(ending: Ending) -> ResultMessage:
    """The result of a child that succeeded; JobFailed, with its class, for every other ending."""
    code = ending.returncode
    if not code and isinstance(ending.verdict, ResultMessage):
        return ending.verdict
    if code is not None and code > 0 and isinstance(ending.verdict, ErrorMessage):
        raise JobFailed(ending.verdict.error_class, ending.verdict.code, ending.verdict.message)
    if code == -signal.SIGKILL:
        why = "The training process was killed, most often because the machine ran out of memory. It is tried again."
        raise JobFailed("infra", "trainer_killed", why)
    if code in (EXIT_STOPPED, -signal.SIGTERM):
        raise JobFailed("infra", "trainer_stopped", "Someone stopped the training process. It is tried again.")
    how = "no result" if not code else f"exit status {code}" if code > 0 else f"signal {-code}"
    why = f"The training process crashed ({how}); the worker's log has the details."
    raise JobFailed("bug", "trainer_crashed", why)


class _Listener:
    """Turns the child's messages into news; keeps its last verdict."""

    def __init__(self, attempt: Attempt, on_checkpoint: Callable[[CheckpointNews], None]) -> None:
        self._news = attempt.news
        self._on_checkpoint = on_checkpoint
        self.verdict: ResultMessage | ErrorMessage | None = None
        self.heard = False

    def hear(self, message: AnyMessage) -> None:
        self.heard = True
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
            case ReadyMessage():
                pass  # of the process, not of its task


class _Stopper:
    """What a child gets when its attempt is stopped: first a request, then no choice. Nothing once closed: then the
    child may be at another's task."""

    def __init__(self, child: Child, grace_seconds: float) -> None:
        self._child = child
        self._timer = threading.Timer(grace_seconds, child.kill)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._armed = self._closed = False

    def __call__(self, reason: Stop) -> None:
        with self._lock:
            if self._closed:
                return
            if reason is Stop.LOST:
                self._child.kill()
                return
            if reason is Stop.DRAIN:
                self._child.drain()
            else:
                self._child.terminate()
            if not self._armed:
                self._armed = True
                self._timer.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._timer.cancel()


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
