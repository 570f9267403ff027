"""What must hold after every fault, once the service is quiet again. Raises AssertionError with all that does not."""

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from safetensors.numpy import load_file
from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.jobs.states import TERMINAL, TRANSITIONS
from registry.models import Blob, Job, JobAttempt, JobEvent, Version, VersionFile
from registry.storage import ObjectStore
from registry.verify import verify
from tests.faults.site import Site

WEIGHTS = "adapter_model.safetensors"


def check(site: Site, *, ended_as: str | None = "succeeded") -> None:
    """All of it; `ended_as` is how every accepted job must have ended, None for any way."""
    with site.sessions() as session:
        wrong = [
            *_lost_jobs(session, site, ended_as),
            *_double_versions(session),
            *_fences(session),
            *_transitions(session),
            *_open_attempts(session),
            *_weights(session, site),
            *_condemned(session),
        ]
    wrong += [f"store: {found}" for found in verify(site.sessions, site.store, digests=True)]
    wrong += _left_behind(site)
    assert not wrong, "\n".join(wrong)


def _lost_jobs(session: Session, site: Site, ended_as: str | None) -> Iterator[str]:
    found = {job.id: job for job in session.scalars(select(Job))}
    for job_id in site.accepted:
        if job_id not in found:
            yield f"job {job_id} was accepted and is gone"
    for job in found.values():
        if job.state not in TERMINAL:
            yield f"job {job.id} is {job.state} after {job.attempt} attempts"
        elif ended_as is not None and job.state != ended_as:
            yield f"job {job.id} ended as {job.state}: {job.error_code} {job.error_message}"


def _double_versions(session: Session) -> Iterator[str]:
    made: dict[uuid.UUID, list[int]] = defaultdict(list)
    numbers: dict[uuid.UUID, list[int]] = defaultdict(list)
    for version in session.scalars(select(Version).order_by(Version.version)):
        made[version.job_id].append(version.version)
        numbers[version.adapter_id].append(version.version)
    for job in session.scalars(select(Job).where(Job.kind == "train")):
        expected = 1 if job.state == "succeeded" else 0
        if len(made[job.id]) != expected:
            yield f"job {job.id} is {job.state} and made the versions {made[job.id]}"
    for adapter, found in numbers.items():
        if found != list(range(1, len(found) + 1)):
            yield f"adapter {adapter} has the versions {found}"


def _fences(session: Session) -> Iterator[str]:
    fences: dict[uuid.UUID, list[int]] = defaultdict(list)
    for attempt in session.scalars(select(JobAttempt).order_by(JobAttempt.attempt)):
        fences[attempt.job_id].append(attempt.fence)
    published = select(Version.job_id, Version.fence, Job.fence).join(Job, Job.id == Version.job_id)
    for job_id, published_by, last in session.execute(published):
        if not published_by == last == fences[job_id][-1]:
            yield f"job {job_id}: published by {published_by}, last owned by {fences[job_id][-1]}"
    everything = [fence for found in fences.values() for fence in found]
    if len(set(everything)) != len(everything):
        yield "two attempts had one fence"
    for job_id, found in fences.items():
        if found != sorted(set(found)):
            yield f"job {job_id}: its fences do not rise: {found}"


def _transitions(session: Session) -> Iterator[str]:
    paths: dict[uuid.UUID, list[str | None]] = defaultdict(list)
    events = select(JobEvent.job_id, JobEvent.data).where(JobEvent.type == "state").order_by(JobEvent.id)
    for job_id, data in session.execute(events):
        path = paths[job_id]
        if (path[-1] if path else None) != data["from"]:
            yield f"job {job_id}: a move from {data['from']} after {path}"
        if path and (data["from"], data["to"]) not in TRANSITIONS:
            yield f"job {job_id}: an illegal move {data}"
        path.append(data["to"])


def _open_attempts(session: Session) -> Iterator[str]:
    still = select(JobAttempt).join(Job, Job.id == JobAttempt.job_id)
    for attempt in session.scalars(still.where(JobAttempt.ended_at.is_(None), Job.state.in_(TERMINAL))):
        yield f"job {attempt.job_id}: attempt {attempt.attempt} never ended"


def _weights(session: Session, site: Site) -> Iterator[str]:
    made = select(Version.job_id, Blob).join(VersionFile, VersionFile.version_id == Version.id)
    made = made.join(Blob, Blob.id == VersionFile.blob_id).where(VersionFile.path == WEIGHTS)
    for job_id, blob in session.execute(made):
        if job_id in site.accepted:
            expected = site.accepted[job_id].weights
            if not _equal(_read(site.store, blob), expected):
                yield f"job {job_id}: its weights are not those of an undisturbed run"


def _read(store: ObjectStore, blob: Blob) -> Mapping[str, np.ndarray]:
    with TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS)
        store.fetch(blob.key, path, sha256=blob.sha256, size=blob.size)
        return load_file(path)


def _equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].tobytes() == expected[name].tobytes() for name in expected
    )


def _condemned(session: Session) -> Iterator[str]:
    for blob in session.scalars(select(Blob).where(Blob.refs > 0, Blob.state != "stored")):
        yield f"blob {blob.id} is {blob.state} and has {blob.refs} references"


def _left_behind(site: Site) -> list[str]:
    """No trainer, no open file and no folder of an attempt; a moment is given to what is being cleaned up."""
    end = time.monotonic() + 60
    while (found := list(_remains(site))) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _remains(site: Site) -> Iterator[str]:
    alive = [worker for worker in site.workers if worker.alive]
    for process in psutil.process_iter():
        try:
            if str(site.home) in process.environ().get("HOME", "") and process.status() != psutil.STATUS_ZOMBIE:
                yield f"the trainer {process.pid} still runs"
        except psutil.Error:
            continue
    for worker in alive:
        if children := worker.children():
            yield f"worker {worker.pid} still has {children}"
        yield from (f"open: {path}" for path in worker.open_files() if "/work/" in path and not path.endswith(".lock"))
    work = site.home / "work"
    if alive and work.is_dir():
        held = {path.stem for path in work.glob("*.lock")}
        for folder in work.iterdir():
            if folder.is_dir() and folder.name in held:
                yield from (f"left behind: {path}" for path in folder.iterdir())
