"""Webhook endpoints of a tenant, and the secrets that sign what is sent to them."""

import base64
import hashlib
import hmac
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.errors import WebhookLimit, WebhookNotFound
from registry.jobs.clock import read_clock
from registry.models import Tenant, WebhookEndpoint
from registry.paging import Page, page_by_age

EventType = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
EVENT_TYPES: Mapping[EventType, str] = {
    "fine_tuning.job.succeeded": "A job has published its version.",
    "fine_tuning.job.failed": "A job has ended without a result.",
    "fine_tuning.job.cancelled": "A job was cancelled.",
}
MOST_ENDPOINTS = 20
OVERLAP = timedelta(hours=24)


def create_endpoint(
    session: Session, *, tenant_id: uuid.UUID, name: str, url: str, event_types: Sequence[EventType]
) -> WebhookEndpoint:
    """A new endpoint; `url` was checked by `parse_target`. WebhookLimit."""
    session.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True))
    count = select(func.count()).select_from(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id)
    if session.scalars(count).one() >= MOST_ENDPOINTS:
        raise WebhookLimit(limit=MOST_ENDPOINTS)
    endpoint = WebhookEndpoint(tenant_id=tenant_id, name=name, url=url, event_types=_once(event_types))
    session.add(endpoint)
    session.flush()
    return endpoint


def get_endpoint(session: Session, *, tenant_id: uuid.UUID, endpoint_id: uuid.UUID) -> WebhookEndpoint:
    """This tenant's endpoint; WebhookNotFound."""
    query = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id)
    endpoint = session.scalar(query.with_for_update(of=WebhookEndpoint, key_share=True))
    if endpoint is None:
        raise WebhookNotFound
    return endpoint


def list_endpoints(
    session: Session, *, tenant_id: uuid.UUID, after: uuid.UUID | None, limit: int
) -> Page[WebhookEndpoint]:
    """This tenant's endpoints, newest first."""
    query = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id)
    return page_by_age(session, query, WebhookEndpoint, after=after, limit=limit)


def update_endpoint(
    session: Session,
    endpoint: WebhookEndpoint,
    *,
    name: str | None = None,
    url: str | None = None,
    event_types: Sequence[EventType] | None = None,
) -> None:
    """Changes what is given."""
    before = (endpoint.name, endpoint.url, endpoint.event_types)
    endpoint.name = endpoint.name if name is None else name
    endpoint.url = endpoint.url if url is None else url
    endpoint.event_types = endpoint.event_types if event_types is None else _once(event_types)
    if (endpoint.name, endpoint.url, endpoint.event_types) != before:
        endpoint.updated_at = read_clock(session)
    session.flush()


def rotate_secret(session: Session, endpoint: WebhookEndpoint, *, keep_old: bool) -> None:
    """The endpoint's next secret; with `keep_old` the one before signs as well for a day."""
    now = read_clock(session)
    endpoint.generation += 1
    endpoint.old_secret_until = now + OVERLAP if keep_old else None
    endpoint.updated_at = now
    session.flush()


def secret_of(endpoint: WebhookEndpoint, *, pepper: bytes) -> str:
    """The secret in force, as its receiver keeps it: `whsec_…`."""
    return f"whsec_{base64.b64encode(_derive(endpoint, endpoint.generation, pepper)).decode()}"


def secrets_of(endpoint: WebhookEndpoint, *, pepper: bytes, now: datetime) -> list[bytes]:
    """The keys that sign now, newest first."""
    generations = [endpoint.generation]
    if endpoint.old_secret_until is not None and endpoint.old_secret_until > now:
        generations.append(endpoint.generation - 1)
    return [_derive(endpoint, generation, pepper) for generation in generations]


def _derive(endpoint: WebhookEndpoint, generation: int, pepper: bytes) -> bytes:
    return hmac.new(pepper, f"webhook {endpoint.id.hex} {generation}".encode(), hashlib.sha256).digest()


def _once(event_types: Sequence[str]) -> list[str]:
    return sorted(set(event_types))
