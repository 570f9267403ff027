"""Adapters, their immutable versions, mutable aliases, and where versions came from."""

import uuid
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.db import Base
from registry.models.base_model import BaseModel
from registry.models.blob import Blob
from registry.models.checkpoint import Checkpoint
from registry.models.columns import SHA256, Created, Id, Json, Moment


class Adapter(Base):
    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        CheckConstraint("name ~ '^[a-z0-9][a-z0-9._-]{0,127}$'", name="name_grammar"),
        CheckConstraint("next_version >= 1", name="versions_start_at_one"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str]
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    next_version: Mapped[int] = mapped_column(
        server_default=text("1"), comment="never goes back: numbers are not reused"
    )
    created_at: Mapped[Created]

    base_model: Mapped[BaseModel] = relationship(lazy="joined", innerjoin=True)


class Version(Base):
    """What one job published, or somebody from one of its checkpoints. `(adapter, version)` names the same bytes for
    ever."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "version"),
        UniqueConstraint("job_id"),  # publication is exactly-once
        UniqueConstraint("checkpoint_id"),
        CheckConstraint("(job_id IS NULL) <> (checkpoint_id IS NULL)", name="made_by_job_or_checkpoint"),
        CheckConstraint("version >= 1", name="starts_at_one"),
        CheckConstraint(f"digest {SHA256}", name="digest_is_hex"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    adapter_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("adapters.id"))
    version: Mapped[int]
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id"))
    checkpoint_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey("checkpoints.id"), comment="the checkpoint that was published; null: the result of job_id"
    )
    fence: Mapped[int] = mapped_column(BigInteger)
    manifest: Mapped[Json] = mapped_column(
        comment="files, base digest, dataset digest, training spec, library versions"
    )
    digest: Mapped[str] = mapped_column(comment="SHA-256 of the canonical manifest")
    metrics: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    # Megabytes for a base with many experts: read only where a merge is made.
    merge_recipe: Mapped[str | None] = mapped_column(
        deferred=True, comment="lora_core.recipe as JSON; null: made from headers when needed"
    )
    created_at: Mapped[Created]
    deleted_at: Mapped[Moment | None]

    adapter: Mapped[Adapter] = relationship(lazy="joined", innerjoin=True)
    checkpoint: Mapped[Checkpoint | None] = relationship(lazy="joined")
    files: Mapped[list["VersionFile"]] = relationship(lazy="raise", order_by="VersionFile.path")


class VersionFile(Base):
    __tablename__ = "version_files"

    version_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("versions.id"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    blob_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("blobs.id"), index=True)

    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)


class Alias(Base):
    __tablename__ = "aliases"
    __table_args__ = (
        CheckConstraint("name ~ '^[a-z][a-z0-9._-]{0,63}$'", name="name_grammar"),
        CheckConstraint("name <> 'latest' AND name !~ '^v?[0-9]+$'", name="not_reserved"),
    )

    adapter_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    version_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("versions.id"), index=True)
    updated_at: Mapped[Created]

    version: Mapped[Version] = relationship(lazy="joined", innerjoin=True)


class LineageEdge(Base):
    """`child` was made from `parent`. No foreign keys: a parent may be deleted, the fact stays."""

    __tablename__ = "lineage"
    __table_args__ = (
        CheckConstraint("relation IN ('trained_on', 'based_on', 'validated_on', 'merged_from')", name="relation_known"),
        Index("ix_lineage_parent", "parent_kind", "parent_id"),
    )

    child_kind: Mapped[str] = mapped_column(primary_key=True)
    child_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    relation: Mapped[str] = mapped_column(primary_key=True)
    parent_kind: Mapped[str] = mapped_column(primary_key=True)
    parent_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    parent_digest: Mapped[str | None] = mapped_column(comment="SHA-256 of the parent when the edge was made")
    created_at: Mapped[Created]
