"""Publishing a checkpoint: its adapter becomes a version of its own, whatever became of the job.

A job still publishes one result at most; a checkpoint is published at most once, and says which job it is of."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from registry.blobs import take_refs
from registry.errors import CheckpointNotFound, CheckpointNotPublishable, JobNotFound, VersionNotFound
from registry.jobs.events import NewEvent, add_events
from registry.jobs.moves import lock_job
from registry.jobs.publish import manifest_digest, next_number, record_parents
from registry.jobs.states import JobKind
from registry.models import Checkpoint, CheckpointFile, Job, Version, VersionFile


@dataclass(frozen=True, slots=True)
class Promoted:
    """The version of a checkpoint; `created` unless it was there already."""

    version: Version
    created: bool


def promote_checkpoint(
    session: Session, *, tenant_id: uuid.UUID, job_id: uuid.UUID, checkpoint_id: uuid.UUID
) -> Promoted:
    """Makes the next version of the job's adapter from what this checkpoint trained. Repeating it gives that version.

    JobNotFound, CheckpointNotFound, CheckpointNotPublishable; VersionNotFound when it was published and deleted."""
    job = lock_job(session, job_id)  # where prunings wait
    if job is None or job.tenant_id != tenant_id or job.kind != JobKind.TRAIN:
        raise JobNotFound
    made = session.scalar(select(Version).where(Version.checkpoint_id == checkpoint_id))
    if made is not None and made.deleted_at is not None:
        raise VersionNotFound
    if made is not None:
        return Promoted(made, created=False)
    checkpoint = get_checkpoint(session, job=job, checkpoint_id=checkpoint_id)
    files = adapter_files(checkpoint)
    take_refs(session, [file.blob_id for file in files])
    manifest = {**checkpoint.manifest["adapter"], "checkpoint": {"job": job.id.hex, "step": checkpoint.step}}
    version = Version(
        tenant_id=job.tenant_id,
        adapter_id=job.adapter_id,
        version=next_number(session, job),
        checkpoint_id=checkpoint.id,
        fence=checkpoint.fence,
        manifest=manifest,
        digest=manifest_digest(manifest),
        metrics=checkpoint.metrics,
        merge_recipe=checkpoint.merge_recipe,
    )
    session.add(version)
    session.flush()
    session.add_all(VersionFile(version_id=version.id, path=file.path, blob_id=file.blob_id) for file in files)
    record_parents(session, job, version)
    told = f"Published the checkpoint of step {checkpoint.step} as {version.adapter.name}@{version.version}."
    add_events(session, job.id, job.fence, [NewEvent("message", "info", told, {"version": version.version})])
    return Promoted(version, created=True)


def get_checkpoint(session: Session, *, job: Job, checkpoint_id: uuid.UUID) -> Checkpoint:
    """The job's checkpoint, if its bytes are kept, with files; CheckpointNotFound."""
    query = select(Checkpoint).where(
        Checkpoint.id == checkpoint_id, Checkpoint.job_id == job.id, Checkpoint.state == "committed"
    )
    found = session.scalar(query.options(selectinload(Checkpoint.files)))
    if found is None:
        raise CheckpointNotFound
    return found


def published_as(session: Session, checkpoint_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, int]:
    """The version numbers of those that were published, by checkpoint."""
    made = select(Version.checkpoint_id, Version.version).where(Version.checkpoint_id.in_(checkpoint_ids))
    return {row.checkpoint_id: row.version for row in session.execute(made.where(Version.deleted_at.is_(None)))}


def adapter_files(checkpoint: Checkpoint) -> list[CheckpointFile]:
    """Those that make an adapter; CheckpointNotPublishable when there are none."""
    adapter = checkpoint.manifest.get("adapter")
    if adapter is None:
        raise CheckpointNotPublishable
    names = {file["path"] for file in adapter["files"]}
    return [file for file in checkpoint.files if file.path in names]
