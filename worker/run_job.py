"""One claimed job from its first heartbeat to the write that gives it away. Nothing escapes but a lost cause."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from registry.db import transaction
from registry.errors import CancelRequested, FenceLost
from registry.failpoints import hit
from registry.jobs.fail import fail
from registry.jobs.lease import release
from registry.jobs.states import JobKind
from registry.models import Job
from worker.attempt import Attempt
from worker.errors import Drained, JobFailed, as_failure
from worker.heart import Heart
from worker.host import Host
from worker.merge_job import run_merge
from worker.outages import persist
from worker.train_job import run_train

log = logging.getLogger(__name__)

Work = Callable[[Host, Attempt, Heart, Job, Path], None]
WORK: dict[str, Work] = {JobKind.TRAIN: run_train, JobKind.MERGE: run_merge}


def run_job(host: Host, attempt: Attempt, job: Job) -> None:
    """Run the job to a published result, or write how it ended. Returns when it is nobody's or ended."""
    heart = Heart(attempt, host.beats, lease_seconds=host.lease_seconds, heartbeat_seconds=host.heartbeat_seconds)
    attempt.news.note(f"Attempt {job.attempt} started on worker {host.name}.")
    heart.start()
    try:
        _work(host, attempt, heart, job)
    except FenceLost:
        log.warning("%s: another worker owns it now; dropped", attempt)
    except Exception as error:
        _give_up(host, attempt, heart, error)
    else:
        log.info("%s: succeeded", attempt)
    finally:
        heart.stop()
        attempt.close()


def _work(host: Host, attempt: Attempt, heart: Heart, job: Job) -> None:
    with host.work.attempt(attempt.job_id, attempt.fence) as workspace:
        WORK[job.kind](host, attempt, heart, job, workspace)


def _give_up(host: Host, attempt: Attempt, heart: Heart, error: Exception) -> None:
    """Write the ending on the job, however long Postgres takes to answer: this slot has nothing better to do."""
    try:
        persist(_ending(host, attempt, heart, error), time.sleep, f"giving up {attempt}")
    except FenceLost:
        log.warning("%s: another worker owns it now; nothing written", attempt)


def _ending(host: Host, attempt: Attempt, heart: Heart, error: Exception) -> Callable[[], None]:
    """The write that an error calls for."""
    if isinstance(error, Drained | CancelRequested):
        log.info("%s: given back (%s)", attempt, type(error).__name__)
        return lambda: heart.conclude(lambda: _release(host, attempt))
    failure = as_failure(error)
    log.warning("%s: %s", attempt, failure, exc_info=None if isinstance(error, JobFailed) else error)
    return lambda: _write_failure(host, attempt, heart, failure)


def _write_failure(host: Host, attempt: Attempt, heart: Heart, failure: JobFailed) -> None:
    heart.beat()  # what happened before it failed belongs into the event list
    heart.conclude(lambda: _fail(host, attempt, failure))


def _release(host: Host, attempt: Attempt) -> None:
    with transaction(host.sessions) as session:
        release(session, job_id=attempt.job_id, fence=attempt.fence)
    hit("release.after_commit")


def _fail(host: Host, attempt: Attempt, failure: JobFailed) -> None:
    with transaction(host.sessions) as session:
        fail(
            session,
            job_id=attempt.job_id,
            fence=attempt.fence,
            error_class=failure.error_class,
            code=failure.code,
            message=failure.message,
            max_infra_failures=host.max_infra_failures,
        )
    hit("fail.after_commit")
