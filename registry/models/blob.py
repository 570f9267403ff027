"""One row per stored object. The row exists before the first byte is sent."""

import uuid

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Base
from registry.models.columns import SHA256, Bytes, Created, Id, Moment


class Blob(Base):
    __tablename__ = "blobs"
    __table_args__ = (
        CheckConstraint("state IN ('intent', 'stored', 'condemned', 'deleted')", name="state_known"),
        CheckConstraint(f"sha256 {SHA256}", name="sha256_is_hex"),
        CheckConstraint("size >= 0", name="size_not_negative"),
        CheckConstraint("refs >= 0", name="refs_not_negative"),
        CheckConstraint("refs = 0 OR state = 'stored'", name="only_stored_is_referenced"),
        Index("ix_blobs_unreferenced", "created_at", postgresql_where=text("refs = 0 AND state <> 'deleted'")),
    )

    id: Mapped[Id]
    tenant_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey("tenants.id"), comment="null: bytes of the shared base-model catalogue"
    )
    job_id: Mapped[uuid.UUID | None] = mapped_column(
        comment="the job that wrote it; no foreign key: jobs refer to files, which refer to blobs"
    )
    fence: Mapped[int | None] = mapped_column(BigInteger, comment="the writer's token, when a job wrote it")
    sha256: Mapped[str] = mapped_column(index=True)
    size: Mapped[Bytes]
    key: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str] = mapped_column(server_default=text("'intent'"))
    refs: Mapped[int] = mapped_column(
        server_default=text("0"),
        comment="changed by UPDATE in the transaction that adds or drops a reference",
    )
    created_at: Mapped[Created]
    condemned_at: Mapped[Moment | None]
