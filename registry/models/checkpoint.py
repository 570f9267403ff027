"""Where a training job can go on from: saved by one attempt, taken up by the next."""

import uuid

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.db import Base
from registry.models.blob import Blob
from registry.models.columns import Created, Id, Json


class Checkpoint(Base):
    """All of a run's state after `step` optimizer steps. The row outlives its files: it stays as what was."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("job_id", "fence", "step"),  # a commit that is sent again finds itself
        CheckConstraint("state IN ('committed', 'corrupt', 'pruned')", name="state_known"),
        CheckConstraint("step >= 0", name="step_not_negative"),
        Index("ix_checkpoints_listing", "job_id", "created_at", "id"),
        Index("ix_checkpoints_resume", "job_id", "step", "fence", postgresql_where=text("state = 'committed'")),
    )

    id: Mapped[Id]
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id"))
    fence: Mapped[int] = mapped_column(BigInteger, comment="token of the owner that saved it")
    step: Mapped[int] = mapped_column(BigInteger, comment="optimizer steps that are in it")
    manifest: Mapped[Json] = mapped_column(comment="files with size and digest")
    metrics: Mapped[Json] = mapped_column(comment="how training stood: losses by name")
    merge_recipe: Mapped[str | None] = mapped_column(
        deferred=True, comment="of its adapter, while its files are kept; null: made from headers when needed"
    )
    state: Mapped[str] = mapped_column(server_default=text("'committed'"))
    created_at: Mapped[Created]

    files: Mapped[list["CheckpointFile"]] = relationship(lazy="raise", order_by="CheckpointFile.path")


class CheckpointFile(Base):
    __tablename__ = "checkpoint_files"

    checkpoint_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("checkpoints.id"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    blob_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("blobs.id"), index=True)

    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)
