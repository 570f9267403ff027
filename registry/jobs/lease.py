"""Who owns a job: claim, heartbeat, release. Needs READ COMMITTED: every statement must see fresh rows."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, String, cast, func, select, true, tuple_, update
from sqlalchemy.orm import Session

from registry.errors import FenceLost
from registry.jobs.attempts import end_attempt, open_attempt
from registry.jobs.clock import NOW, in_seconds
from registry.jobs.conditions import IS_OWNED, IS_QUEUED
from registry.jobs.events import NewEvent, add_events
from registry.jobs.moves import finish, lock_owned, requeue
from registry.jobs.states import JobState
from registry.models import Job, Tenant, fence_seq


@dataclass(frozen=True, slots=True)
class Beat:
    """The answer to a heartbeat that still owns its job."""

    cancel: bool
    pause: bool


@dataclass(frozen=True, slots=True)
class Line:
    """The jobs of one tenant in one queue."""

    tenant_id: uuid.UUID
    queue: str


IS_CLAIMABLE: ColumnElement[bool] = IS_QUEUED & Job.paused_at.is_(None) & (Job.run_after <= NOW)


def claim(session: Session, *, queues: Sequence[str], worker: str, lease_seconds: float) -> Job | None:
    """Takes the next claimable job of these queues: attempt + 1, a new fence, a lease. None when there is none.

    Must be the first thing in its transaction: it may wait for a tenant's lock, and never waits for one while it
    holds another."""
    # Tenants whose lock is free come first; a busy one is waited for only when nobody else has work.
    passed_over: list[Line] = []
    for wait in (False, True):
        attempt = session.begin_nested()
        while line := _lock_next_line(session, queues, passed_over, wait=wait):
            if _has_room(session, line.tenant_id):
                job = _take(session, line, worker=worker, lease_seconds=lease_seconds)
                if job is not None:
                    attempt.commit()
                    return job
            attempt.rollback()  # gives the tenant's lock back
            passed_over.append(line)
            attempt = session.begin_nested()
        attempt.rollback()
    return None


def heartbeat(
    session: Session,
    *,
    job_id: uuid.UUID,
    fence: int,
    lease_seconds: float,
    progress: dict[str, Any] | None,
    events: Sequence[NewEvent] = (),
    events_made: int | None = None,
) -> Beat:
    """Extends the lease and records progress and events; FenceLost when the job has another owner or none.

    An owner that counts its events says how many it made so far, `events` being the last of them: those that an
    earlier beat stored, whose answer got lost, are not stored again. A lease that ran out but was not yet collected is
    extended: the fence, not the time, decides."""
    values: dict[str, Any] = {"lease_expires_at": in_seconds(lease_seconds), "heartbeat_at": NOW}
    if progress is not None:
        values["progress"] = progress
    owned = (Job.id == job_id, Job.fence == fence, IS_OWNED)
    beaten = update(Job).where(*owned).values(values).returning(Job.state, Job.paused_at, Job.events_told)
    found = session.execute(beaten, execution_options={"synchronize_session": False}).one_or_none()
    if found is None:
        raise FenceLost
    if events_made is not None:
        untold = min(len(events), max(0, events_made - found.events_told))
        events = events[len(events) - untold :]
    if events and events_made is not None:
        told = update(Job).where(*owned).values(events_told=events_made)
        session.execute(told, execution_options={"synchronize_session": False})
    add_events(session, job_id, fence, events)
    cancel = found.state == JobState.CANCELLING
    return Beat(cancel=cancel, pause=found.paused_at is not None and not cancel)


def release(session: Session, *, job_id: uuid.UUID, fence: int) -> JobState:
    """The owner lets go without fault: back to the queue at once, no penalty; cancelled if that was asked for."""
    job = lock_owned(session, job_id, fence)
    if job.state == JobState.CANCELLING:
        end_attempt(session, job, "cancelled")
        return finish(session, job, JobState.CANCELLED)
    end_attempt(session, job, "released")
    return requeue(session, job, delay_seconds=0)


def _lock_next_line(session: Session, queues: Sequence[str], passed_over: Sequence[Line], *, wait: bool) -> Line | None:
    """Of each tenant the line with its most urgent job; of these the most urgent as far as its tenant's floor lets it;
    among equals, that of the tenant that runs the fewest.

    Its tenant is locked, so that nobody else claims for it; a tenant that is locked already is waited for or, in the
    same look, left to others: a crowd of claimers spreads instead of trying every tenant in turn.
    One look into the index per tenant and queue, however many jobs wait."""
    served = func.unnest(cast(queues, ARRAY(String))).table_valued("queue").render_derived(name="served")
    queue = served.c.queue
    head = select(Job.priority, Job.run_after).where(IS_CLAIMABLE, Job.tenant_id == Tenant.id, Job.queue == queue)
    head = head.order_by(Job.priority, Job.run_after, Job.id).limit(1).correlate(Tenant, served)
    waiting = head.lateral("waiting")
    own = select(queue, waiting.c.priority, waiting.c.run_after).select_from(served).join(waiting, true())
    if passed_over:
        own = own.where(tuple_(Tenant.id, queue).not_in([(line.tenant_id, line.queue) for line in passed_over]))
    first = own.order_by(waiting.c.priority, waiting.c.run_after).limit(1).correlate(Tenant).lateral("first")
    owned = select(Job.tenant_id, func.count().label("jobs")).where(IS_OWNED).group_by(Job.tenant_id).subquery("owned")
    lines = select(Tenant.id, first.c.queue).select_from(Tenant).join(first, true())
    lines = lines.outerjoin(owned, owned.c.tenant_id == Tenant.id)
    running = func.coalesce(owned.c.jobs, 0)
    urgency = func.greatest(first.c.priority, Tenant.priority_floor)  # nobody overtakes others by saying so
    lines = lines.order_by(urgency, running, first.c.run_after).limit(1)
    row = session.execute(lines.with_for_update(of=Tenant, key_share=True, skip_locked=not wait)).one_or_none()
    return None if row is None else Line(*row)


def _has_room(session: Session, tenant_id: uuid.UUID) -> bool:
    """Whether the locked tenant may run one more."""
    max_running = session.scalars(select(Tenant.max_running).where(Tenant.id == tenant_id)).one()
    running = select(func.count()).select_from(Job).where(Job.tenant_id == tenant_id, IS_OWNED)
    return session.scalars(running).one() < max_running


def _take(session: Session, line: Line, *, worker: str, lease_seconds: float) -> Job | None:
    # SKIP LOCKED: a job that is being cancelled right now is somebody else's business.
    first = (
        select(Job.id)
        .where(IS_CLAIMABLE, Job.tenant_id == line.tenant_id, Job.queue == line.queue)
        .order_by(Job.priority, Job.run_after, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    job_id = session.scalar(first)
    if job_id is None:
        return None
    taken = (
        update(Job)
        .where(Job.id == job_id)
        .values(
            state=JobState.RUNNING,
            attempt=Job.attempt + 1,
            fence=fence_seq.next_value(),
            worker=worker,
            lease_expires_at=in_seconds(lease_seconds),
            heartbeat_at=NOW,
            started_at=func.coalesce(Job.started_at, NOW),
            progress=None,
            events_told=0,
            error_class=None,
            error_code=None,
            error_message=None,
        )
        .returning(Job)
    )
    options = {"synchronize_session": False, "populate_existing": True}
    job = session.scalars(taken, execution_options=options).one()
    open_attempt(session, job)
    return job
