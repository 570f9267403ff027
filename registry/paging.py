"""Keyset pages: a row's own place in the order is the cursor, so no OFFSET and no COUNT."""

import uuid
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

from registry.errors import InvalidCursor
from registry.models import Checkpoint, File, Job, WebhookEndpoint

T = TypeVar("T")
D = TypeVar("D", Checkpoint, File, Job, WebhookEndpoint)  # what is listed by age


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows of a list, and whether more follow."""

    items: list[T]
    has_more: bool


def take_page(session: Session, query: Select[T], *, limit: int) -> Page[T]:
    """The first `limit` rows of an ordered query."""
    rows = list(session.scalars(query.limit(limit + 1)))
    return Page(rows[:limit], len(rows) > limit)


def page_by_age(
    session: Session,
    query: Select[D],
    model: type[D],
    *,
    after: uuid.UUID | None,
    limit: int,
    order: Literal["asc", "desc"] = "desc",
    anchors: Select[D] | None = None,
) -> Page[D]:
    """Rows of `query` by (created_at, id), newest first unless told; starts behind the row `after`.

    `query` already holds the tenant filter, so a row outside the caller's list is InvalidCursor. `anchors` also
    holds rows that are no longer listed: who deletes a page row by row goes on behind its last row."""
    place = tuple_(model.created_at, model.id)
    if after is not None:
        anchor = session.scalar((query if anchors is None else anchors).where(model.id == after))
        if anchor is None:
            raise InvalidCursor(param="after")
        bound = tuple_(anchor.created_at, anchor.id)
        query = query.where(place < bound if order == "desc" else place > bound)
    if order == "desc":
        query = query.order_by(model.created_at.desc(), model.id.desc())
    else:
        query = query.order_by(model.created_at, model.id)
    return take_page(session, query, limit=limit)
