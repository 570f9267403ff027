"""What a job told about itself. State changes are written by the database's own trigger."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.errors import InvalidCursor
from registry.models import JobEvent
from registry.paging import Page, take_page

MESSAGE_CHARS = 4000


@dataclass(frozen=True, slots=True)
class NewEvent:
    """One line of a job's log, or one point of its curves."""

    type: Literal["message", "metrics", "state"]
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any] | None = None


def add_events(session: Session, job_id: uuid.UUID, fence: int | None, events: Sequence[NewEvent]) -> None:
    """Appends events in order. The caller has shown, by a guarded update, that it owns the job."""
    session.add_all(
        JobEvent(job_id=job_id, fence=fence, type=e.type, level=e.level, message=storable_text(e.message), data=e.data)
        for e in events
    )
    session.flush()


def list_events(session: Session, *, job_id: uuid.UUID, after: int | None, limit: int) -> Page[JobEvent]:
    """A job's events, newest first; `after` is the id of the last one seen."""
    query = select(JobEvent).where(JobEvent.job_id == job_id)
    if after is not None:
        if session.scalar(query.where(JobEvent.id == after)) is None:
            raise InvalidCursor(param="after")
        query = query.where(JobEvent.id < after)
    return take_page(session, query.order_by(JobEvent.id.desc()), limit=limit)


def events_after(session: Session, *, job_id: uuid.UUID, after: int, limit: int) -> Page[JobEvent]:
    """A job's events behind the number `after`, oldest first.

    Whoever writes one holds the job's row, so a job's numbers become visible in their order and none is missed."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after)
    return take_page(session, query.order_by(JobEvent.id), limit=limit)


def storable_text(text: str) -> str:
    """Text from a trainer as Postgres can hold it: no NUL, no lone surrogates, bounded."""
    clean = text[:MESSAGE_CHARS].replace("\0", "\N{REPLACEMENT CHARACTER}")
    return clean.encode("utf-8", "replace").decode()
