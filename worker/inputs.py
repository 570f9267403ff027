"""What a job needs, brought to local disk and verified. Outages are waited out; a stop is noticed between files."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy.orm import Session

from registry.db import transaction
from registry.jobs.inputs import BaseInput, StoredFile
from registry.models import Job
from worker.attempt import Attempt
from worker.host import Host
from worker.outages import persist

T = TypeVar("T")


def read_inputs(host: Host, attempt: Attempt, job: Job, read: Callable[[Session, Job], T]) -> T:
    """`read` in one short transaction."""

    def call() -> T:
        with transaction(host.sessions) as session:
            return read(session, job)

    return persist(call, attempt.wait, f"reading the inputs of {attempt}")


def fetch_file(host: Host, attempt: Attempt, file: StoredFile, path: Path) -> Path:
    """Download one file to `path`."""
    attempt.check()

    def call() -> Path:
        host.store.fetch(file.key, path, sha256=file.sha256, size=file.size)
        return path

    return persist(call, attempt.wait, f"fetching {file.path} for {attempt}")


def fetch_base(host: Host, attempt: Attempt, base: BaseInput) -> Path:
    """The folder of the base model in this machine's cache."""

    def call() -> Path:
        return host.cache.ensure(base.digest, base.files, attempt.check)

    return persist(call, attempt.wait, f"fetching the base model for {attempt}")
