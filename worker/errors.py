"""How an attempt can end other than well, and which class of failure the job row gets."""

import errno

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from registry.errors import ArtifactCorrupt, DepotError, ObjectMissing, Unavailable
from worker.protocol import ErrorClass


class JobFailed(Exception):
    """This attempt failed; `message` is for the person who submitted the job."""

    def __init__(self, error_class: ErrorClass, code: str, message: str) -> None:
        self.error_class: ErrorClass = error_class
        self.code = code
        self.message = message
        super().__init__(f"{error_class}/{code}: {message}")


class Drained(Exception):
    """This worker is shutting down; the job goes back to the queue without a penalty."""


def is_outage(error: BaseException) -> bool:
    """Whether the database or the store did not answer, so that the same call may work later."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InterfaceError | PoolTimeout | Unavailable)


def as_failure(error: Exception) -> JobFailed:
    """What to write on the job for an exception that nobody expected."""
    if isinstance(error, JobFailed):
        return error
    if isinstance(error, ArtifactCorrupt | ObjectMissing):
        return JobFailed("infra", error.code, error.message)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return JobFailed("infra", "disk_full", "The worker's disk is full. The job is tried again.")
    if is_outage(error):
        code = error.code if isinstance(error, DepotError) else "database_unavailable"
        return JobFailed("infra", code, "The database or the object store did not answer. The job is tried again.")
    if isinstance(error, OSError):
        return JobFailed("infra", "worker_error", f"The worker's machine failed: {error.strerror}.")
    return JobFailed("bug", "internal", "The worker failed in an unexpected way; its log has the details.")
