"""From rows to the service's own objects. A page of them costs a fixed few queries."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from sqlalchemy.orm import Session

from api.depot.merge_schemas import MergeError, MergeObject
from api.depot.schemas import (
    AdapterObject,
    BaseModelObject,
    LineageObject,
    VersionObject,
)
from api.schemas import StoredObject, unix, unix_or_none
from registry.adapters import alias_numbers, latest_numbers
from registry.ids import public_id
from registry.jobs.states import JobState
from registry.lineage import parents_by_child
from registry.models import Adapter, BaseModel, Blob, LineageEdge, Merge, Version


class HasBlob(Protocol):
    """A file of a version, a merge or a base model."""

    path: str
    blob: Blob


def digest(sha256: str) -> str:
    return f"sha256:{sha256}"


def stored_objects(files: Iterable[HasBlob]) -> list[StoredObject]:
    return [StoredObject(path=file.path, bytes=file.blob.size, sha256=file.blob.sha256) for file in files]


def adapter_objects(session: Session, adapters: Sequence[Adapter]) -> list[AdapterObject]:
    """These adapters with their latest versions and aliases."""
    latest, aliases = latest_numbers(session, adapters), alias_numbers(session, adapters)
    return [
        AdapterObject(
            name=adapter.name,
            base_model=adapter.base_model.name,
            latest_version=latest.get(adapter.id),
            aliases=aliases[adapter.id],
            created_at=unix(adapter.created_at),
        )
        for adapter in adapters
    ]


def version_objects(session: Session, adapter: Adapter, versions: Sequence[Version]) -> list[VersionObject]:
    """These versions of one adapter, with their aliases, files and lineage."""
    aliases = alias_numbers(session, [adapter])[adapter.id]
    lineage = parents_by_child(session, "version", [version.id for version in versions])
    return [_version(adapter, version, aliases, lineage) for version in versions]


def _version(
    adapter: Adapter,
    version: Version,
    aliases: Mapping[str, int],
    lineage: Mapping[uuid.UUID, Sequence[LineageEdge]],
) -> VersionObject:
    return VersionObject(
        adapter=adapter.name,
        version=version.version,
        ref=f"{adapter.name}@{version.version}",
        aliases=[name for name, number in aliases.items() if number == version.version],
        base_model=adapter.base_model.name,
        digest=digest(version.digest),
        job_id=public_id("ftjob", _job_of(version)),
        checkpoint=public_id("ftckpt", version.checkpoint_id) if version.checkpoint_id else None,
        metrics=version.metrics,
        lora=version.manifest.get("spec", {}).get("lora", {}),
        lineage=[_edge(edge, adapter.base_model) for edge in lineage[version.id]],
        files=stored_objects(version.files),
        created_at=unix(version.created_at),
    )


def _job_of(version: Version) -> uuid.UUID:
    """The job that trained it, whether it is the result or a checkpoint on the way there."""
    if version.checkpoint is not None:
        return version.checkpoint.job_id
    if version.job_id is None:
        raise RuntimeError(f"version {version.id} is of nothing")
    return version.job_id


def _edge(edge: LineageEdge, base: BaseModel) -> LineageObject:
    """An edge whose parent is named as its own routes name it."""
    is_base = edge.parent_kind == "base_model" and edge.parent_id == base.id
    return LineageObject(
        relation=edge.relation,
        kind=edge.parent_kind,
        id=base.name if is_base else public_id(edge.parent_kind, edge.parent_id),
        digest=digest(edge.parent_digest) if edge.parent_digest else None,
    )


def merge_object(merge: Merge) -> MergeObject:
    job = merge.job
    failed = job.state == JobState.FAILED and job.error_code is not None
    return MergeObject(
        id=public_id("merge", merge.id),
        adapter=merge.version.adapter.name,
        version=merge.version.version,
        dtype=merge.dtype,
        scale=merge.scale,
        shard_size=merge.shard_size,
        start=merge.start,
        aliases=merge.aliases,
        status="running" if job.state == JobState.CANCELLING else job.state,
        progress=job.progress,
        error=MergeError(code=job.error_code or "", message=job.error_message or "") if failed else None,
        digest=digest(merge.digest) if merge.digest else None,
        report=merge.report,
        files=stored_objects(merge.files),
        created_at=unix(merge.created_at),
        finished_at=unix_or_none(job.finished_at),
    )


def base_model_object(base: BaseModel) -> BaseModelObject:
    modules = base.facts["linear_modules"]
    return BaseModelObject(
        name=base.name,
        source=base.source,
        revision=base.revision,
        architecture=base.architecture,
        dtype=base.dtype,
        parameters=base.parameters,
        digest=digest(base.digest),
        linear_modules=sorted({path.rpartition(".")[2] for path in modules}),
        expert_parameters=sorted({".".join(path.split(".")[-3:]) for path in base.facts.get("expert_parameters", {})}),
        files=stored_objects(base.files),
        created_at=unix(base.created_at),
    )
