"""Uploaded files, as OpenAI's API knows them."""

import uuid
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.db import Base
from registry.models.blob import Blob
from registry.models.columns import Created, Id, Moment


class File(Base):
    __tablename__ = "files"
    __table_args__ = (
        CheckConstraint("purpose IN ('fine-tune', 'base-model')", name="purpose_known"),
        Index("ix_files_listing", "tenant_id", "created_at", "id"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    blob_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("blobs.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    report: Mapped[dict[str, Any] | None] = mapped_column(JSONB, comment="what validation found: rows, format")
    created_at: Mapped[Created]
    deleted_at: Mapped[Moment | None]

    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)
