"""The only clock that leases and delays know: Postgres', read when the statement runs."""

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, DateTime, func, select
from sqlalchemy.orm import Session

NOW: ColumnElement[datetime] = func.clock_timestamp(type_=DateTime(timezone=True))


def in_seconds(seconds: float) -> ColumnElement[datetime]:
    """The moment this many seconds after the statement runs."""
    return NOW + timedelta(seconds=seconds)


def read_clock(session: Session, *, ahead_seconds: float = 0) -> datetime:
    """What Postgres' clock shows now, or will show this many seconds later."""
    return session.scalars(select(in_seconds(ahead_seconds))).one()
