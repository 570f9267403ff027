"""The one transaction that makes a result exist. Its bytes are stored and verified before it starts."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from registry import lineage
from registry.adapters import point_alias
from registry.blobs import take_refs
from registry.errors import CancelRequested, FenceLost
from registry.jobs.attempts import end_attempt
from registry.jobs.checkpoints import prune_checkpoints
from registry.jobs.events import NewEvent, add_events
from registry.jobs.moves import finish, lock_job
from registry.jobs.states import JobState
from registry.models import Adapter, BaseModel, File, Job, Merge, MergeFile, Version, VersionFile


@dataclass(frozen=True, slots=True)
class Published:
    """The version a job made; `replayed` when an earlier call of the same owner had already made it."""

    version: int
    replayed: bool


def publish_version(
    session: Session,
    *,
    job_id: uuid.UUID,
    fence: int,
    files: Mapping[str, uuid.UUID],
    manifest: dict[str, Any],
    metrics: dict[str, Any] | None,
    trained_tokens: int | None,
    merge_recipe: str | None = None,
) -> Published:
    """Makes the adapter's next version of these blobs and ends the job; all of it or nothing.

    Repeating it with the same fence, after a lost answer, gives the same version. FenceLost, CancelRequested."""
    job = _lock_publishable(session, job_id, fence)
    if job.state == JobState.SUCCEEDED:
        made = session.scalars(select(Version).where(Version.job_id == job_id)).one()
        return Published(made.version, replayed=True)
    take_refs(session, files.values())
    version = Version(
        tenant_id=job.tenant_id,
        adapter_id=job.adapter_id,
        version=next_number(session, job),
        job_id=job.id,
        fence=fence,
        manifest=manifest,
        digest=manifest_digest(manifest),
        metrics=metrics,
        merge_recipe=merge_recipe,
    )
    session.add(version)
    session.flush()
    session.add_all(VersionFile(version_id=version.id, path=path, blob_id=blob) for path, blob in files.items())
    record_parents(session, job, version)
    job.trained_tokens = trained_tokens
    prune_checkpoints(session, job.id, keep=0)
    told = f"Published {version.adapter.name}@{version.version}."
    add_events(session, job.id, fence, [NewEvent("message", "info", told, {"version": version.version})])
    end_attempt(session, job, "succeeded")
    finish(session, job, JobState.SUCCEEDED)
    return Published(version.version, replayed=False)


def publish_merge(
    session: Session,
    *,
    job_id: uuid.UUID,
    fence: int,
    files: Mapping[str, uuid.UUID],
    digest: str,
    report: dict[str, Any],
) -> bool:
    """Gives the job's merge its files, points the aliases that wait for it at its version, and ends the job. True when
    this owner had already done so."""
    wanted = select(Version.id).join(Merge, Merge.version_id == Version.id).where(Merge.job_id == job_id)
    session.execute(wanted.with_for_update(of=Version))  # before the job: in the order of whoever asks for a merge
    job = _lock_publishable(session, job_id, fence)
    if job.state == JobState.SUCCEEDED:
        return True
    take_refs(session, files.values())
    merge = session.scalars(select(Merge).where(Merge.job_id == job_id)).one()
    session.refresh(merge, ["aliases"])
    for alias in merge.aliases:
        point_alias(session, merge.version, alias)
        told = f"{merge.version.adapter.name}@{alias} is version {merge.version.version} now."
        add_events(session, job.id, fence, [NewEvent("message", "info", told)])
    merge.digest, merge.report = digest, report
    session.add_all(MergeFile(merge_id=merge.id, path=path, blob_id=blob) for path, blob in files.items())
    child: lineage.Node = ("merge", merge.id)
    version: lineage.Node = ("version", merge.version_id)
    lineage.record(session, child=child, relation="merged_from", parent=version, digest=merge.version.digest)
    _record_base(session, child, job)
    end_attempt(session, job, "succeeded")
    finish(session, job, JobState.SUCCEEDED)
    return False


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest as JSON with sorted keys and no spaces: the version's own digest."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _lock_publishable(session: Session, job_id: uuid.UUID, fence: int) -> Job:
    """The locked job: running under this fence, or ended well by it."""
    job = lock_job(session, job_id)
    if job is None or job.fence != fence:
        raise FenceLost
    if job.state == JobState.CANCELLING:
        raise CancelRequested
    if job.state not in (JobState.RUNNING, JobState.SUCCEEDED):
        raise FenceLost
    return job


def next_number(session: Session, job: Job) -> int:
    """The next version number of the adapter that the job publishes to."""
    taken = update(Adapter).where(Adapter.id == job.adapter_id).values(next_version=Adapter.next_version + 1)
    numbers = session.scalars(
        taken.returning(Adapter.next_version - 1), execution_options={"synchronize_session": False}
    )
    return numbers.one()


def record_parents(session: Session, job: Job, version: Version) -> None:
    """What the job was given is what the version was made from."""
    child: lineage.Node = ("version", version.id)
    _record_base(session, child, job)
    inputs: list[tuple[lineage.Relation, uuid.UUID | None]] = [
        ("trained_on", job.training_file_id),
        ("validated_on", job.validation_file_id),
    ]
    for relation, file_id in inputs:
        if file_id is not None:
            digest = session.scalars(select(File).where(File.id == file_id)).one().blob.sha256
            lineage.record(session, child=child, relation=relation, parent=("file", file_id), digest=digest)


def _record_base(session: Session, child: lineage.Node, job: Job) -> None:
    digest = session.scalars(select(BaseModel.digest).where(BaseModel.id == job.base_model_id)).one()
    parent: lineage.Node = ("base_model", job.base_model_id)
    lineage.record(session, child=child, relation="based_on", parent=parent, digest=digest)
