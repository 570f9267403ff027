"""A job's events as they happen."""

import json
import re
import uuid
from typing import Annotated

from fastapi import Header
from starlette.responses import Response

from api.context import DepotDep, PrincipalDep
from api.openai.job_out import event_object
from api.openai.jobs import parse_job_id
from api.openai.schemas import EVENT
from api.refusals import TooManyStreams
from api.routing import Permission, Router
from api.streams import EventStream, News, Told, event_lines, stream_example
from registry import errors
from registry.db import SessionFactory, transaction
from registry.jobs.events import events_after
from registry.jobs.queries import get_job
from registry.jobs.states import TERMINAL

router = Router("Fine-tuning")
BATCH = 200
_PREFIX = "ftevent-"
_EVENT_ID = re.compile(rf"{_PREFIX}([0-9]{{1,18}})")


@router.declare(
    "GET",
    "/fine_tuning/jobs/{job_id}/events/stream",
    permission=Permission.JOBS_READ,
    summary="Follow a job's events as they happen",
    raises=(errors.JobNotFound, errors.InvalidCursor, TooManyStreams),
    response_class=Response,
    responses={
        200: stream_example(f"id: ftevent-42\nevent: metrics\ndata: {json.dumps(EVENT)}\n\n"),
        204: {"description": "The job has ended, and you have seen all of its events"},
    },
)
def stream(
    job_id: str, depot: DepotDep, principal: PrincipalDep, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """Server-sent events, oldest first, until the job has ended. `Last-Event-ID` continues behind an event; a stream
    also ends after 15 minutes, and clients of this kind continue by themselves."""
    after = 0
    if last_event_id is not None:
        if (match := _EVENT_ID.fullmatch(last_event_id)) is None:
            raise errors.InvalidCursor(param="Last-Event-ID")
        after = int(match[1])
    with transaction(depot.sessions) as session:
        found = get_job(session, tenant_id=principal.tenant_id, job_id=parse_job_id(job_id))
    news = read_news(depot.sessions, principal.tenant_id, found.id, after)
    if news.ended and not news.events:
        return Response(status_code=204)
    depot.streams.take(principal.key_id)
    lines = event_lines(
        lambda seen: read_news(depot.sessions, principal.tenant_id, found.id, seen), after, prefix=_PREFIX
    )
    return EventStream(lines, on_end=lambda: depot.streams.give_back(principal.key_id))


def read_news(sessions: SessionFactory, tenant_id: uuid.UUID, job_id: uuid.UUID, after: int) -> News:
    """A batch of the job's events behind number `after`."""
    with transaction(sessions) as session:
        # The job before its events: when it has ended, all its events are there to read.
        ended = get_job(session, tenant_id=tenant_id, job_id=job_id).state in TERMINAL
        page = events_after(session, job_id=job_id, after=after, limit=BATCH)
    told = [Told(event.id, event.type, event_object(event).model_dump_json()) for event in page.items]
    return News(told, more=page.has_more, ended=ended)
