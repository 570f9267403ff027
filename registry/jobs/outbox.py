"""Wake-ups on their way to the broker: at least once, and only hints, for idle workers also ask Postgres."""

import logging
import uuid
from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.failpoints import hit
from registry.jobs.clock import NOW, read_clock
from registry.jobs.moves import backoff_seconds
from registry.models import Outbox

logger = logging.getLogger(__name__)

Send = Callable[[str, uuid.UUID], None]
FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 60.0  # how late a wake-up may be once the broker is back


def relay(sessions: SessionFactory, send: Send, *, limit: int = 100) -> int:
    """Sends due wake-ups and answers how many; stops at the first failure, which is retried later.

    One message per transaction: no lock outlives one `send`, whose own timeout bounds it."""
    sent = 0
    while sent < limit:
        with transaction(sessions) as session:
            if not _relay_one(session, send):
                break
        sent += 1
    return sent


def _relay_one(session: Session, send: Send) -> bool:
    # `sent_at IS NULL`, never "id above the last one": ids become visible out of order.
    due = select(Outbox).where(Outbox.sent_at.is_(None), Outbox.next_at <= NOW)
    row = session.scalar(due.order_by(Outbox.next_at).limit(1).with_for_update(skip_locked=True))
    if row is None:
        return False
    try:
        send(row.queue, row.job_id)
    except Exception:  # whatever the broker's client raises, the wake-up was not delivered
        # Not louder: `send` belongs to the caller, who can say once that the broker is away.
        logger.debug("a wake-up for queue %s was not delivered", row.queue, exc_info=True)
        delay = backoff_seconds(FIRST_BACKOFF_SECONDS, row.attempts, longest=LONGEST_BACKOFF_SECONDS)
        row.next_at = read_clock(session, ahead_seconds=delay)
        row.attempts += 1
        return False
    hit("outbox.after_send")
    row.sent_at = read_clock(session)
    return True
