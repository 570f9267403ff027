"""The catalogue of frozen bases: W0, its files and what they contain."""

import uuid

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.db import Base
from registry.models.blob import Blob
from registry.models.columns import SHA256, Bytes, Created, Id, Json


class BaseModel(Base):
    __tablename__ = "base_models"
    __table_args__ = (CheckConstraint(f"digest {SHA256}", name="digest_is_hex"),)

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(unique=True, comment="what jobs name in `model`, e.g. Qwen/Qwen3-0.6B")
    source: Mapped[str] = mapped_column(comment="where it came from, for people: hub:org/name or upload")
    revision: Mapped[str | None] = mapped_column(comment="resolved commit of the source, never `main`")
    architecture: Mapped[str]
    dtype: Mapped[str]
    parameters: Mapped[Bytes]
    digest: Mapped[str] = mapped_column(comment="SHA-256 of the sorted lines '<sha256>  <path>'")
    facts: Mapped[Json] = mapped_column(comment="linear modules and their shapes, ties, context length")
    created_at: Mapped[Created]

    files: Mapped[list["BaseModelFile"]] = relationship(lazy="raise", order_by="BaseModelFile.path")


class BaseModelFile(Base):
    __tablename__ = "base_model_files"

    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    blob_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("blobs.id"), index=True)

    blob: Mapped[Blob] = relationship(lazy="joined", innerjoin=True)
