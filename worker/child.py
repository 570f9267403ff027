"""`python -m worker.child`: does the tasks in the workspaces that stdin names, and tells the supervisor about them.

stdin is a life line, too: when it ends, the supervisor is dead and so is this process; Linux sees to that even while it
is stopped. stdout carries messages and nothing else: whatever a library prints goes to the log."""

import ctypes
import errno
import faulthandler
import os
import signal
import sys
import threading
import traceback
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from lora_core.errors import LoraError
from worker.protocol import EXIT_STOPPED, ErrorClass, ErrorMessage
from worker.reporter import Reporter, Stopped
from worker.task import CanaryTask, TrainTask, read_task

if TYPE_CHECKING:
    from worker.kept_base import KeptBase

EXIT_FAILED = 1
PR_SET_PDEATHSIG = 1

# Codes of lora_core that say something about the request; all others are about us.
USER_CODES = frozenset(
    {
        "bad_config",
        "invalid_recipe",
        "invalid_training_file",
        "key_mismatch",
        "merge_not_faithful",
        "no_gradient",
        "no_trainable_tokens",
        "non_finite",
        "shape_mismatch",
        "unknown_target_modules",
    }
)


def main() -> int:
    """The exit code: 0 after a result, EXIT_STOPPED when asked to stop, EXIT_FAILED with an error message."""
    die_with_supervisor()
    reporter = Reporter(take_stdout())
    workspaces: SimpleQueue[Path] = SimpleQueue()
    threading.Thread(target=follow_supervisor, args=(workspaces,), name="life-line", daemon=True).start()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stop(reporter, drain=False))
    signal.signal(signal.SIGUSR1, lambda _signal, _frame: stop(reporter, drain=True))
    faulthandler.register(signal.SIGUSR2)  # to stderr, whatever holds the interpreter
    try:
        while do_task(workspaces.get(), reporter):
            pass
    except Stopped:
        return EXIT_STOPPED
    except Exception as error:
        traceback.print_exc()
        reporter.write(explain(error))
        return EXIT_FAILED
    return 0


def do_task(workspace: Path, reporter: Reporter) -> bool:
    """Do the task and tell the result; whether this process is fit for another."""
    task = read_task(workspace)
    if isinstance(task, TrainTask):
        from worker.train_child import train_adapter

        reporter.write(train_adapter(task, workspace, reporter, kept_base()))
        return task.stay and stays(reporter)
    if isinstance(task, CanaryTask):
        from worker.canary_child import compare_merge

        reporter.write(compare_merge(task, workspace, reporter))
        return False
    from worker.merge_child import merge_adapter

    reporter.write(merge_adapter(task, workspace, reporter))
    return False


def stays(reporter: Reporter) -> bool:
    """Whether this process offered itself for another task. That it could not does not make the result a failure."""
    try:
        return not has_children() and kept_base().offer(reporter)
    except Exception:
        traceback.print_exc()
        return False


@cache
def kept_base() -> "KeptBase":
    """That of this process. Made late, as it needs torch."""
    from worker.kept_base import KeptBase

    return KeptBase()


def has_children() -> bool:
    """Whether a process that this one started is still there."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def die_with_supervisor() -> None:
    """Have the kernel kill this process when the supervisor dies: it needs no turn of ours for that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def take_stdout() -> int:
    """A private copy of stdout; from now on, descriptor 1 is the log."""
    private = os.dup(1)
    os.dup2(2, 1)
    return private


def follow_supervisor(workspaces: "SimpleQueue[Path]") -> None:
    with os.fdopen(0, "rb", closefd=False) as lines:
        for line in lines:
            workspaces.put(Path(os.fsdecode(line.rstrip(b"\n"))))
    os._exit(EXIT_STOPPED)


def stop(reporter: Reporter, *, drain: bool) -> None:
    """Let a step that has begun end; before the first one there is nothing worth waiting for."""
    reporter.stop(drain=drain)
    if not reporter.in_steps:
        os._exit(EXIT_STOPPED)


def explain(error: Exception) -> ErrorMessage:
    """What went wrong, in the words and the class that the job shows."""
    if isinstance(error, LoraError):
        return ErrorMessage(error_class=class_of(error), code=error.code, message=error.message[:2000])
    if is_out_of_memory(error):
        advice = "Use a smaller batch_size, max_length or r."
        return ErrorMessage(error_class="oom", code="out_of_memory", message=f"Training ran out of memory. {advice}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ErrorMessage(error_class="infra", code="disk_full", message="The worker's disk is full.")
    message = "Training failed in an unexpected way; the worker's log has the details."
    return ErrorMessage(error_class="bug", code="internal", message=message)


def is_out_of_memory(error: Exception) -> bool:
    """Without torch: a merge needs none."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def class_of(error: LoraError) -> ErrorClass:
    if error.code == "training_diverged":
        return "diverged"
    # The base was checked when it was registered: what is wrong with it now is damage on this machine.
    return "user" if error.code in USER_CODES else "infra"


if __name__ == "__main__":
    sys.exit(main())
