"""What a claimed job needs from the store: names, places and digests, read in one short transaction."""

import uuid
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_core.checkpoint import CHECKPOINT_FILES
from registry.base_models import base_files
from registry.errors import FileNotFound, VersionNotFound
from registry.jobs.attempts import count_endings
from registry.jobs.checkpoints import newest_checkpoints
from registry.jobs.spec import MergeSpec, TrainSpec
from registry.models import BaseModel, Blob, File, Job, Version, VersionFile


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of an artifact: its name there, where its bytes lie, and what they must be."""

    path: str
    key: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class BaseInput:
    """The frozen base of a job."""

    name: str
    revision: str | None
    digest: str
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class CheckpointInput:
    """Where a job can go on from."""

    id: uuid.UUID
    step: int
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class TrainInputs:
    base: BaseInput
    training: StoredFile
    validation: StoredFile | None
    spec: TrainSpec
    halvings: int  # how often the machine ran out of memory


@dataclass(frozen=True, slots=True)
class VersionInput:
    """A version, to be merged into its base."""

    base: BaseInput
    ref: str  # name@7
    digest: str
    files: tuple[StoredFile, ...]
    recipe: str | None  # lora_core.recipe as JSON


@dataclass(frozen=True, slots=True)
class MergeInputs:
    version: VersionInput
    spec: MergeSpec


def train_inputs(session: Session, job: Job) -> TrainInputs:
    """The inputs of a training job. Its files cannot be deleted before it ends."""
    validation = None if job.validation_file_id is None else _file(session, job.validation_file_id)
    return TrainInputs(
        base=_base(session, job.base_model_id),
        training=_file(session, job.training_file_id),
        validation=validation,
        spec=TrainSpec.model_validate(job.spec),
        halvings=count_endings(session, job.id, "host_oom"),
    )


def merge_inputs(session: Session, job: Job) -> MergeInputs:
    """The inputs of a merge job. Its version cannot be deleted before it ends."""
    spec = MergeSpec.model_validate(job.spec)
    version = session.get(Version, spec.version_id)
    if version is None or version.deleted_at is not None:
        raise VersionNotFound
    return MergeInputs(version_input(session, version), spec)


def version_input(session: Session, version: Version) -> VersionInput:
    """What any merge of a version is computed from."""
    files = session.scalars(select(VersionFile).where(VersionFile.version_id == version.id).order_by(VersionFile.path))
    return VersionInput(
        base=_base(session, version.adapter.base_model_id),
        ref=f"{version.adapter.name}@{version.version}",
        digest=version.digest,
        files=tuple(_stored(file.path, file.blob) for file in files),
        recipe=version.merge_recipe,
    )


def checkpoint_inputs(session: Session, job: Job) -> list[CheckpointInput]:
    """What an interrupted job can go on from, furthest first."""
    return [
        CheckpointInput(
            row.id,
            row.step,
            tuple(_stored(file.path, file.blob) for file in row.files if file.path in CHECKPOINT_FILES),
        )
        for row in newest_checkpoints(session, job.id)
    ]


def _base(session: Session, base_model_id: uuid.UUID) -> BaseInput:
    base = session.get_one(BaseModel, base_model_id)
    files = tuple(_stored(file.path, file.blob) for file in base_files(session, base_model_id))
    return BaseInput(base.name, base.revision, base.digest, files)


def _file(session: Session, file_id: uuid.UUID | None) -> StoredFile:
    file = session.get(File, file_id) if file_id else None
    if file is None or file.deleted_at is not None:
        raise FileNotFound
    return _stored(file.filename, file.blob)


def _stored(path: str, blob: Blob) -> StoredFile:
    return StoredFile(path, blob.key, blob.sha256, blob.size)
