"""One task in one child process, and what its ending means for this machine."""

import logging
from collections.abc import Callable
from pathlib import Path

from worker.attempt import Attempt
from worker.child_env import child_env
from worker.errors import JobFailed
from worker.host import Host
from worker.protocol import CheckpointNews, ResultMessage
from worker.supervisor import Ending, result_of, run_child
from worker.task import Task, write_task

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
    ending = run_child(
        [*host.child_argv, str(workspace)],
        env=child_env(workspace, threads=host.threads),
        directory=workspace,
        attempt=attempt,
        grace_seconds=host.grace_seconds,
        on_checkpoint=on_checkpoint,
    )
    attempt.check()
    try:
        return result_of(ending)
    except JobFailed as failure:
        _look_into(host, attempt, failure, ending, base_digest)
        raise


def _look_into(host: Host, attempt: Attempt, failure: JobFailed, ending: Ending, base_digest: str) -> None:
    if failure.error_class in ("bug", "infra"):
        # A damaged file in the cache can look like anything; the next attempt reads all of them again.
        host.cache.doubt(base_digest)
        log.warning("%s: %s; the end of the child's log:\n%s", attempt, failure, ending.log_tail)
