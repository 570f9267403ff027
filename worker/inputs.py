"""What a job needs, brought to local disk and verified. Outages are waited out; a stop is noticed at once."""

import logging
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy.orm import Session

from registry.apart import run_apart
from registry.db import transaction
from registry.errors import ArtifactCorrupt, ObjectMissing
from registry.jobs.checkpoints import mark_corrupt
from registry.jobs.inputs import BaseInput, StoredFile, checkpoint_inputs
from registry.models import Job
from worker.attempt import Attempt
from worker.host import Host
from worker.outages import persist, transfer

log = logging.getLogger(__name__)
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

    return transfer(call, attempt, f"fetching {file.path} for {attempt}")


def fetch_base(host: Host, attempt: Attempt, base: BaseInput) -> Path:
    """The folder of the base model in this machine's cache, where it stays until the attempt is over."""
    attempt.hold(host.cache.using(base.digest))

    def fetch(get: Callable[[], None]) -> None:
        attempt.wait_for(run_apart(get, f"fetching the base model for {attempt}"))

    def call() -> Path:
        return host.cache.ensure(base.digest, base.files, attempt.check, fetch)

    return persist(call, attempt.wait, f"fetching the base model for {attempt}")


def fetch_checkpoint(host: Host, attempt: Attempt, job: Job, folder: Path) -> Path | None:
    """The furthest checkpoint of the job whose bytes are whole, in `folder`. Damaged ones are marked, and told."""
    for candidate in read_inputs(host, attempt, job, checkpoint_inputs):
        target = folder / str(candidate.step)
        target.mkdir(parents=True)
        try:
            for file in candidate.files:
                fetch_file(host, attempt, file, target / file.path)
        except (ArtifactCorrupt, ObjectMissing) as error:
            log.warning("%s: the checkpoint of step %d: %s", attempt, candidate.step, error.message)
            shutil.rmtree(target)
            persist(partial(_mark, host, attempt, candidate.id), attempt.wait, f"marking a checkpoint of {attempt}")
        else:
            return target
    return None


def _mark(host: Host, attempt: Attempt, checkpoint_id: uuid.UUID) -> None:
    with transaction(host.sessions) as session:
        mark_corrupt(session, job_id=attempt.job_id, fence=attempt.fence, checkpoint_id=checkpoint_id)
