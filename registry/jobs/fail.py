"""An attempt ended without a result: what kind of trouble decides whether another may start."""

import uuid
from collections.abc import Mapping
from typing import Literal

from sqlalchemy.orm import Session

from registry.jobs.attempts import CRASH_LOOP, count_endings, crashes_in_a_row, end_attempt, last_step
from registry.jobs.events import NewEvent, add_events
from registry.jobs.moves import backoff_seconds, finish, lock_owned, note_error, requeue
from registry.jobs.states import JobState
from registry.models import Job

ErrorClass = Literal["user", "diverged", "oom", "host_oom", "native_crash", "infra", "bug"]

RETRIES: Mapping[str, int] = {"bug": 2, "host_oom": 2, "native_crash": 1}
FIRST_BACKOFF_SECONDS = 5.0


def fail(
    session: Session,
    *,
    job_id: uuid.UUID,
    fence: int,
    error_class: ErrorClass,
    code: str,
    message: str,
    max_infra_failures: int,
) -> JobState:
    """Ends the attempt and answers where the job went; FenceLost when it is no longer this owner's.

    A recorded cancel wins over every class. `infra` is retried until its budget is spent, others as RETRIES says;
    `user`, `diverged` and `oom` would only repeat themselves. So would what crashed at one step three times, or ran
    the machine out of memory there twice, although the second time less was in memory at once."""
    job = lock_owned(session, job_id, fence)
    if job.state == JobState.CANCELLING:
        end_attempt(session, job, "cancelled", error_class=error_class, code=code, message=message)
        return finish(session, job, JobState.CANCELLED)
    earlier = count_endings(session, job.id, error_class)
    end_attempt(session, job, "failed", error_class=error_class, code=code, message=message)
    crashes = crashes_in_a_row(session, job.id, step) if (step := last_step(job)) else 0
    if crashes == CRASH_LOOP:
        told = f"Training ended {CRASH_LOOP} times at step {step}, the last time so: {message}"
        _tell(session, job, "crash_loop", "crash_loop", told)
        return finish(session, job, JobState.FAILED)
    _tell(session, job, error_class, code, message)
    if error_class == "host_oom" and crashes > 1:
        return finish(session, job, JobState.FAILED)
    if error_class == "infra":
        return lose_attempt(session, job, first_backoff=FIRST_BACKOFF_SECONDS, max_infra_failures=max_infra_failures)
    if earlier < RETRIES.get(error_class, 0):
        return requeue(session, job, delay_seconds=backoff_seconds(FIRST_BACKOFF_SECONDS, earlier))
    return finish(session, job, JobState.FAILED)


def lose_attempt(session: Session, job: Job, *, first_backoff: float, max_infra_failures: int) -> JobState:
    """One more attempt lost to the machinery: requeued with a growing delay, failed once the budget is spent."""
    job.infra_failures += 1
    if job.infra_failures > max_infra_failures:
        return finish(session, job, JobState.FAILED)
    return requeue(session, job, delay_seconds=backoff_seconds(first_backoff, job.infra_failures - 1))


def _tell(session: Session, job: Job, error_class: str, code: str, message: str) -> None:
    note_error(job, error_class=error_class, code=code, message=message)
    data = {"error_class": error_class, "code": code, "attempt": job.attempt}
    add_events(session, job.id, job.fence, [NewEvent("message", "error", message, data)])
