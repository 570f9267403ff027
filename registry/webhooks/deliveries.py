"""Events on their way to webhooks: written with what they tell of, sent at least once, for a day."""

import json
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.errors import WebhookNotAllowed
from registry.ids import public_id
from registry.jobs.clock import NOW, read_clock
from registry.models import Job, WebhookDelivery, WebhookEndpoint
from registry.webhooks.endpoints import secrets_of
from registry.webhooks.send import SECONDS, deliver
from registry.webhooks.targets import Resolve

log = logging.getLogger(__name__)
AT_ONCE = 4
FOR = timedelta(hours=24)
FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 5.0, 3600.0
# Longer than any delivery: two workers do not send the same event at the same time.
CLAIMED_SECONDS = 6 * SECONDS
_IS_DUE = WebhookDelivery.ended_at.is_(None) & (WebhookDelivery.next_at <= NOW)


def announce(session: Session, job: Job) -> None:
    """Tells every endpoint that wants to know that this job has ended."""
    event_type = f"fine_tuning.job.{job.state}"
    wanted = WebhookEndpoint.tenant_id == job.tenant_id, WebhookEndpoint.event_types.any_() == event_type
    # KEY SHARE: an endpoint that is being deleted is waited for and then passed over, so that it fails no job.
    locked = select(WebhookEndpoint.id).where(*wanted).with_for_update(read=True, key_share=True)
    endpoints = session.scalars(locked).all()
    if not endpoints:
        return
    event = make_event(event_type, public_id("ftjob", job.id), read_clock(session))
    session.add_all(
        WebhookDelivery(endpoint_id=endpoint_id, event_id=event["id"], payload=event) for endpoint_id in endpoints
    )
    session.flush()


def make_event(event_type: str, subject: str, now: datetime) -> dict[str, Any]:
    """OpenAI's event about a job."""
    event_id = public_id("evt", uuid.uuid4())
    created_at = int(now.timestamp())
    return {"id": event_id, "object": "event", "created_at": created_at, "type": event_type, "data": {"id": subject}}


def encode(event: dict[str, Any]) -> bytes:
    """The body of a delivery."""
    return json.dumps(event, separators=(",", ":")).encode()


def deliver_due(
    sessions: SessionFactory, *, pepper: bytes, allow_lan: bool, lookup: Resolve | None = None, limit: int = 50
) -> int:
    """Sends what is due, up to `limit` events, and answers how many were. No transaction is open while one is sent.

    AT_ONCE of them at a time, so that a receiver that hangs does not hold up the others."""
    with transaction(sessions) as session:
        due = select(WebhookDelivery.id).where(_IS_DUE).limit(min(limit, AT_ONCE))
        lanes = len(session.scalars(due).all())
    if not lanes:
        return 0

    def send(lane: int) -> int:
        share = limit // lanes + (lane < limit % lanes)
        return _deliver_some(sessions, share, pepper=pepper, allow_lan=allow_lan, lookup=lookup)

    with ThreadPoolExecutor(lanes, thread_name_prefix="messenger") as pool:
        return sum(pool.map(send, range(lanes)))


def _deliver_some(
    sessions: SessionFactory, limit: int, *, pepper: bytes, allow_lan: bool, lookup: Resolve | None
) -> int:
    """One after the other, until nothing is due."""
    sent = 0
    while sent < limit:
        with transaction(sessions) as session:
            claimed = _claim(session)
            now = read_clock(session)
        if claimed is None:
            break
        outcome, final = _attempt(claimed, now, pepper=pepper, allow_lan=allow_lan, lookup=lookup)
        with transaction(sessions) as session:
            _settle(session, claimed, outcome, final=final)
        sent += 1
    return sent


def _claim(session: Session) -> WebhookDelivery | None:
    due = select(WebhookDelivery).where(_IS_DUE)
    due = due.order_by(WebhookDelivery.next_at).limit(1).with_for_update(of=WebhookDelivery, skip_locked=True)
    found = session.scalar(due)
    if found is not None:
        found.attempts += 1
        found.next_at = read_clock(session, ahead_seconds=CLAIMED_SECONDS)
    return found


def _attempt(
    delivery: WebhookDelivery, now: datetime, *, pepper: bytes, allow_lan: bool, lookup: Resolve | None
) -> tuple[str, bool]:
    """What came of sending it, and whether that is the end of it."""
    endpoint = delivery.endpoint
    try:
        status = deliver(
            endpoint.url,
            encode(delivery.payload),
            secrets=secrets_of(endpoint, pepper=pepper, now=now),
            event_id=delivery.event_id,
            timestamp=int(now.timestamp()),
            allow_lan=allow_lan,
            lookup=lookup,
        )
    except WebhookNotAllowed:
        return "blocked", True
    except OSError as error:
        return type(error).__name__, False
    return str(status), 200 <= status < 300


def _settle(session: Session, delivery: WebhookDelivery, outcome: str, *, final: bool) -> None:
    stored = session.get(WebhookDelivery, delivery.id)
    if stored is None:
        return  # its endpoint was deleted meanwhile
    now = read_clock(session)
    stored.outcome = outcome
    if final or now - stored.created_at > FOR:
        stored.ended_at = now
        return
    wait = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(stored.attempts - 1, 30))
    stored.next_at = now + timedelta(seconds=wait)
