"""Who uses the depot: tenants and their API keys."""

import uuid

from sqlalchemy import CheckConstraint, ForeignKey, SmallInteger, text
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Base
from registry.models.columns import Created, Id, Moment


class Tenant(Base):
    __tablename__ = "tenants"
    __table_args__ = (CheckConstraint("max_queued >= 0 AND max_running >= 0", name="limits_not_negative"),)

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(unique=True)
    max_queued: Mapped[int] = mapped_column(server_default=text("1000"))
    max_running: Mapped[int] = mapped_column(server_default=text("64"))
    priority_floor: Mapped[int] = mapped_column(
        SmallInteger,
        server_default=text("100"),
        comment="jobs more urgent than this come first among the tenant's own only",
    )
    created_at: Mapped[Created]


class ApiKey(Base):
    """A key is shown once; only its public id and a keyed hash of its secret are stored."""

    __tablename__ = "api_keys"
    __table_args__ = (CheckConstraint("secret_hmac ~ '^[0-9a-f]{64}$'", name="secret_is_hashed"),)

    id: Mapped[Id]
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str]
    key_id: Mapped[str] = mapped_column(unique=True, comment="the part of the key that is not secret")
    secret_hmac: Mapped[str] = mapped_column(comment="HMAC-SHA256(pepper, secret), hex")
    created_at: Mapped[Created]
    revoked_at: Mapped[Moment | None]
