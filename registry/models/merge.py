"""Merged checkpoints W0 + BA, made by merge jobs and kept as files."""

import uuid
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Double, ForeignKey, Index, Text, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.db import Base
from registry.models.adapter import Version
from registry.models.blob import Blob
from registry.models.columns import SHA256, Created, Id
from registry.models.job import Job


class Merge(Base):
    """The same request on the same version is the same merge, unless the earlier one failed or was cancelled."""

    __tablename__ = "merges"
    __table_args__ = (
        CheckConstraint("dtype IN ('base', 'float32', 'bfloat16', 'float16')", name="dtype_known"),
        CheckConstraint("start IN ('original', 'nf4')", name="start_known"),
        CheckConstraint(f"digest IS NULL OR digest {SHA256}", name="digest_is_hex"),
        Index(
            "uq_merges_live",
            *("version_id", "dtype", "scale", "shard_size", "start"),
            unique=True,
            postgresql_where=text("live"),
            postgresql_nulls_not_distinct=True,
        ),
    )

    id: Mapped[Id]
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    version_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("versions.id"), index=True)
    dtype: Mapped[str] = mapped_column(comment="`base` keeps the base model's dtype")
    scale: Mapped[float] = mapped_column(
        Double,
        server_default=text("1"),
        comment="what the change is multiplied by, besides the adapter's own scaling",
    )
    shard_size: Mapped[int | None] = mapped_column(
        BigInteger, comment="bytes of tensors per shard; null keeps the base's shards"
    )
    start: Mapped[str] = mapped_column(
        server_default=text("'original'"),
        comment="`nf4`: linear layers start from what 4-bit numbers leave of them",
    )
    aliases: Mapped[list[str]] = mapped_column(
        ARRAY(Text),
        server_default=text("'{}'"),
        comment="names that point at the version from the merge's publication on",
    )
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id"), unique=True)
    live: Mapped[bool] = mapped_column(
        server_default=text("true"), comment="false once its job failed or was cancelled"
    )
    digest: Mapped[str | None]
    report: Mapped[dict[str, Any] | None] = mapped_column(JSONB, comment="what changed and what rounding lost")
    created_at: Mapped[Created]

    version: Mapped[Version] = relationship(lazy="joined", innerjoin=True)
    job: Mapped[Job] = relationship(lazy="joined", innerjoin=True)
    files: Mapped[list["MergeFile"]] = relationship(lazy="raise", order_by="MergeFile.path")


class MergeFile(Base):
    __tablename__ = "merge_files"

    merge_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("merges.id"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    blob_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("blobs.id"), index=True)

    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)
