"""One task in one child process, and what its ending means for this machine."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from worker.attempt import Attempt
from worker.child_env import child_env
from worker.errors import JobFailed
from worker.host import Host
from worker.process import Child
from worker.protocol import CheckpointNews, ResultMessage
from worker.supervisor import Ending, result_of, run_child
from worker.task import Task, TrainTask, write_task
from worker.warm import Warmth

MEMORY_WAS_TAKEN = (
    "Memory ran out while processes that wait for another job held some of it. They were ended; it is tried again."
)

log = logging.getLogger(__name__)


def run_task(
    host: Host,
    attempt: Attempt,
    task: Task,
    workspace: Path,
    *,
    base_digest: str,
    on_checkpoint: Callable[[CheckpointNews], None] = lambda _: None,
) -> ResultMessage:
    """The child's result. Raises why the attempt was stopped, or JobFailed with the class of the child's failure."""
    attempt.check()
    write_task(workspace, task)

    def run(child: Child) -> Ending:
        return run_child(child, workspace, attempt=attempt, patience=host.patience, on_checkpoint=on_checkpoint)

    if isinstance(task, TrainTask):
        warmth = Warmth(attempt.tenant_id, base_digest, task.spec.lora.quantization)
        return _run_warm(host, attempt, warmth, run)
    child = start_child(host)
    try:
        return _judge(host, attempt, run(child), base_digest)
    finally:
        child.end()


def start_child(host: Host) -> Child:
    """A new process with a home of its own."""
    home = host.work.make_home()
    try:
        return Child(host.child_argv, env=child_env(home, threads=host.threads), directory=home)
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def _run_warm(host: Host, attempt: Attempt, warmth: Warmth, run: Callable[[Child], Ending]) -> ResultMessage:
    """In a process that has the base in memory, if there is one."""
    while True:
        with host.warm.borrow(warmth, lambda: start_child(host)) as child:
            ending = run(child)
            died_waiting = child.tasks > 1 and ending.returncode is not None and not ending.heard
            if not died_waiting or attempt.reason:
                try:
                    return _judge(host, attempt, ending, warmth.base_digest)
                except JobFailed as failure:
                    if failure.error_class in ("oom", "host_oom") and host.warm.clear():
                        raise JobFailed("infra", "memory_was_taken", MEMORY_WAS_TAKEN) from failure
                    raise
        log.info("%s: child %d had died while it waited", attempt, child.pid)


def _judge(host: Host, attempt: Attempt, ending: Ending, base_digest: str) -> ResultMessage:
    attempt.check()
    try:
        return result_of(ending)
    except JobFailed as failure:
        _look_into(host, attempt, failure, ending, base_digest)
        raise


def _look_into(host: Host, attempt: Attempt, failure: JobFailed, ending: Ending, base_digest: str) -> None:
    if failure.error_class in ("bug", "infra", "native_crash"):
        # A damaged file in the cache can look like anything; the next attempt reads all of them again.
        host.cache.doubt(base_digest)
        log.warning("%s: %s; the end of the child's log:\n%s", attempt, failure, ending.log_tail)
