"""One task in one child: given to it, watched, stopped in steps, its ending explained."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker.attempt import Attempt, Stop
from worker.errors import JobFailed
from worker.memory import in_gib, machine_bytes, oom_kills, resident_bytes
from worker.process import LOG_FILE, Child
from worker.protocol import (
    EXIT_STOPPED,
    AliveMessage,
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
DUMP_SECONDS = 2.0
NATIVE_CRASHES = {-number for number in (signal.SIGSEGV, signal.SIGILL, signal.SIGABRT, signal.SIGFPE)}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long a child gets: to end after it was asked to; to say something (twice that before its first step); to go
    on while Postgres does not answer."""

    grace_seconds: float
    stall_seconds: float
    detached_seconds: float


@dataclass(frozen=True)
class Ending:
    """How a child ended (None: it lives, ready for another task), and the last thing it said about its task.

    `heard` is false for a child that never said anything about it; `stalled` is true for one that was killed for its
    silence, `oom_killed` if the kernel killed for memory meanwhile; `peak_bytes` is the most it was seen to hold."""

    returncode: int | None
    verdict: ResultMessage | ErrorMessage | None
    log_tail: str
    heard: bool = True
    stalled: bool = False
    oom_killed: bool = False
    peak_bytes: int = 0


def run_child(
    child: Child,
    workspace: Path,
    *,
    attempt: Attempt,
    patience: Patience,
    on_checkpoint: Callable[[CheckpointNews], None],
) -> Ending:
    """Have the child do the task in `workspace`, passing what it tells to `attempt.news`, and about checkpoints to
    `on_checkpoint`.

    Cancel sends SIGTERM, drain SIGUSR1, and both SIGKILL when the grace is over; a lost fence SIGKILL at once. One
    that is silent for too long leaves a dump of its stacks in its log and is killed."""
    log.info("%s: child %d begins its task %d", attempt, child.pid, child.tasks + 1)
    listener = _Listener(attempt, on_checkpoint)
    kills, peak, stalled = oom_kills(), 0, False
    child.assign(workspace, listener.hear)
    stopper = _Stopper(child, patience.grace_seconds)
    attempt.on_stop(stopper)
    try:
        while not child.wait(LOOK_SECONDS):
            peak = max(peak, resident_bytes(child.pid))
            if not stalled and listener.has_stalled(patience.stall_seconds):
                stalled = True
                _end_stalled(child)
            elif attempt.detached_seconds() > patience.detached_seconds:
                attempt.stop(Stop.DETACHED)
    finally:
        stopper.close()
    attempt.news.flush()
    log.info("%s: child %d %s", attempt, child.pid, "is ready again" if child.ready else f"ended: {child.returncode}")
    return Ending(
        child.returncode,
        listener.verdict,
        _tail(workspace / LOG_FILE),
        heard=listener.heard,
        stalled=stalled,
        oom_killed=oom_kills() > kills,
        peak_bytes=peak,
    )


def result_of(ending: Ending) -> ResultMessage:
    """The result of a child that succeeded; JobFailed, with its class, for every other ending."""
    code = ending.returncode
    if not code and isinstance(ending.verdict, ResultMessage):
        return ending.verdict
    if code is not None and code > 0 and isinstance(ending.verdict, ErrorMessage):
        raise JobFailed(ending.verdict.error_class, ending.verdict.code, ending.verdict.message)
    if ending.stalled:
        why = "The training process made no progress for too long and was ended. It is tried again."
        raise JobFailed("infra", "stalled", why)
    if code == -signal.SIGKILL and ending.oom_killed:
        held = f"the training process held {in_gib(ending.peak_bytes)} of the machine's {in_gib(machine_bytes())}"
        why = f"The machine ran out of memory: {held}. Use a smaller batch_size, max_length or r."
        raise JobFailed("host_oom", "host_out_of_memory", why)
    if code == -signal.SIGKILL:
        raise JobFailed("infra", "trainer_killed", "Someone killed the training process. It is tried again.")
    if code in NATIVE_CRASHES:
        why = f"The training process crashed in native code ({signal.Signals(-code).name}); the worker's log has more."
        raise JobFailed("native_crash", "trainer_crashed", why)
    if code == -signal.SIGBUS:
        raise JobFailed("infra", "machine_fault", "The machine could not read memory or disk. The job is tried again.")
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
        self._last = time.monotonic()
        self._has_stepped = False
        self.verdict: ResultMessage | ErrorMessage | None = None
        self.heard = False

    def has_stalled(self, seconds: float) -> bool:
        """Whether nothing was heard for this long, or twice this long before the first step."""
        return time.monotonic() - self._last > (seconds if self._has_stepped else 2 * seconds)

    def hear(self, message: AnyMessage) -> None:
        self.heard = True
        self._last = time.monotonic()
        match message:
            case PhaseMessage():
                self._news.phase(message.phase, total_steps=message.total_steps)
            case StepMessage():
                self._has_stepped = True
                self._news.step(message)
            case NoteMessage():
                self._news.note(message.message, level=message.level)
            case CheckpointMessage() | ResumedMessage():
                self._on_checkpoint(message)
            case ResultMessage() | ErrorMessage():
                self.verdict = message
            case ReadyMessage() | AliveMessage():
                pass  # of the process, not of its task; nothing but a sign of life


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
            if reason in (Stop.DRAIN, Stop.DETACHED):
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


def _end_stalled(child: Child) -> None:
    log.warning("child %d makes no progress; it is ended", child.pid)
    child.dump()
    child.wait(DUMP_SECONDS)
    child.kill()


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
