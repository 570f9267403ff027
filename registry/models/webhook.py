"""Where tenants want to hear of their jobs, and what is on its way there."""

import uuid

from sqlalchemy import ARRAY, ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.db import Base
from registry.models.columns import Created, Id, Json, Moment, Serial


class WebhookEndpoint(Base):
    """No secret is stored: it follows from the service's own key, the endpoint's id and `generation`."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("ix_webhook_endpoints_listing", "tenant_id", "created_at", "id"),)

    id: Mapped[Id]
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]] = mapped_column(ARRAY(String))
    generation: Mapped[int] = mapped_column(server_default=text("1"), comment="counts the secrets it had")
    old_secret_until: Mapped[Moment | None] = mapped_column(comment="until then the secret before signs as well")
    created_at: Mapped[Created]
    updated_at: Mapped[Created]


class WebhookDelivery(Base):
    """One event for one endpoint, written in the transaction that made it true."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_endpoint_id", "endpoint_id"),
        Index("ix_webhook_deliveries_due", "next_at", postgresql_where=text("ended_at IS NULL")),
    )

    id: Mapped[Serial]
    endpoint_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    event_id: Mapped[str]
    payload: Mapped[Json]
    created_at: Mapped[Created]
    next_at: Mapped[Created]
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    ended_at: Mapped[Moment | None] = mapped_column(comment="delivered, blocked or given up")
    outcome: Mapped[str | None] = mapped_column(comment="the last status, or why there was none")

    endpoint: Mapped[WebhookEndpoint] = relationship(lazy="joined", innerjoin=True)
