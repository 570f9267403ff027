"""An attempt ended without a result: what kind of trouble decides whether another may start."""

import uuid
from typing import Literal

from sqlalchemy.orm import Session

from registry.jobs.attempts import count_bugs, end_attempt
from registry.jobs.events import NewEvent, add_events
from registry.jobs.moves import backoff_seconds, finish, lock_owned, note_error, requeue
from registry.jobs.states import JobState
from registry.models import Job

ErrorClass = Literal["user", "diverged", "oom", "infra", "bug", "drain"]

MAX_BUG_RETRIES = 2
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

    A recorded cancel wins over every class. `infra` is retried until its budget is spent, `bug` twice, `drain`
    without limit or penalty; `user`, `diverged` and `oom` would only repeat themselves."""
    job = lock_owned(session, job_id, fence)
    if job.state == JobState.CANCELLING:
        end_attempt(session, job, "cancelled", error_class=error_class, code=code, message=message)
        return finish(session, job, JobState.CANCELLED)
    if error_class == "drain":
        end_attempt(session, job, "released", error_class=error_class, code=code, message=message)
        return requeue(session, job, delay_seconds=0)
    earlier_bugs = count_bugs(session, job.id) if error_class == "bug" else 0
    end_attempt(session, job, "failed", error_class=error_class, code=code, message=message)
    _tell(session, job, error_class, code, message)
    if error_class == "infra":
        return lose_attempt(session, job, first_backoff=FIRST_BACKOFF_SECONDS, max_infra_failures=max_infra_failures)
    if error_class == "bug" and earlier_bugs < MAX_BUG_RETRIES:
        return requeue(session, job, delay_seconds=backoff_seconds(FIRST_BACKOFF_SECONDS, earlier_bugs))
    return finish(session, job, JobState.FAILED)


def lose_attempt(session: Session, job: Job, *, first_backoff: float, max_infra_failures: int) -> JobState:
    """One more attempt lost to the machinery: requeued with a growing delay, failed once the budget is spent."""
    job.infra_failures += 1
    if job.infra_failures > max_infra_failures:
        return finish(session, job, JobState.FAILED)
    return requeue(session, job, delay_seconds=backoff_seconds(first_backoff, job.infra_failures - 1))


def _tell(session: Session, job: Job, error_class: ErrorClass, code: str, message: str) -> None:
    note_error(job, error_class=error_class, code=code, message=message)
    data = {"error_class": error_class, "code": code, "attempt": job.attempt}
    add_events(session, job.id, job.fence, [NewEvent("message", "error", message, data)])
