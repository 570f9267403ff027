"""Why a queued job does not run yet, and for how long that may last."""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import case, func, select, tuple_
from sqlalchemy.orm import Session

from registry.jobs.clock import read_clock
from registry.jobs.conditions import IS_OWNED, IS_QUEUED
from registry.jobs.states import JobState
from registry.models import Job, Tenant, Worker

Reason = Literal["paused", "backoff", "no_worker", "tenant_limit", "waiting_for_worker"]
RECENT = 20  # jobs of the same tenant and kind that the estimate looks at


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job's place by urgency and age (fair share between tenants may serve it sooner or later), the reason
    why it waits, and the seconds after which it may start, if anything is known about that."""

    position: int
    reason: Reason
    message: str
    until: datetime | None = None
    estimate_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Crew:
    slots: int
    busy: int


def explain_waiting(session: Session, job: Job, *, lately_seconds: float) -> Waiting | None:
    """Why this job waits; None unless it is queued. A worker unseen for `lately_seconds` counts as gone."""
    if job.state != JobState.QUEUED:
        return None
    now = read_clock(session)
    position = _position(session, job, now)
    if job.paused_at is not None:
        told = "The job is paused. Let it go on with `POST /v1/fine_tuning/jobs/{id}/resume`."
        return Waiting(position, "paused", told)
    crew = _crew(session, job.queue, seen_after=now - timedelta(seconds=lately_seconds))
    if job.run_after > now:
        told = f"It may start again at {job.run_after:%H:%M:%S} UTC."
        if job.error_code is not None:
            told += f" Its last attempt ended with {job.error_code}."
        return Waiting(position, "backoff", told, job.run_after, (job.run_after - now).total_seconds())
    if crew.slots == 0:
        return Waiting(position, "no_worker", f"No worker has served the queue {job.queue!r} lately. Start one.")
    estimate = _estimate(session, job, crew, position)
    limit = session.scalars(select(Tenant.max_running).where(Tenant.id == job.tenant_id)).one()
    owned = select(func.count()).select_from(Job).where(Job.tenant_id == job.tenant_id, IS_OWNED)
    if session.scalars(owned).one() >= limit:
        told = f"Your limit of {limit} running jobs is reached; this one starts when another ends."
        return Waiting(position, "tenant_limit", told, None, estimate)
    told = f"{crew.busy} of {crew.slots} worker slots are busy; {position - 1} jobs come first."
    return Waiting(position, "waiting_for_worker", told, None, estimate)


def _position(session: Session, job: Job, now: datetime) -> int:
    ahead = select(func.count()).select_from(Job)
    ahead = ahead.where(IS_QUEUED, Job.paused_at.is_(None), Job.queue == job.queue, Job.run_after <= now)
    floor = session.scalars(select(Tenant.priority_floor).where(Tenant.id == job.tenant_id)).one()
    own = tuple_(Job.priority, Job.run_after, Job.id) < tuple_(job.priority, job.run_after, job.id)
    urgency = tuple_(func.greatest(Job.priority, Tenant.priority_floor), Job.run_after, Job.id)
    others = urgency < tuple_(max(job.priority, floor), job.run_after, job.id)
    ahead = ahead.join(Tenant, Tenant.id == Job.tenant_id).where(
        case((Job.tenant_id == job.tenant_id, own), else_=others)
    )
    return 1 + session.scalars(ahead).one()


def _crew(session: Session, queue: str, *, seen_after: datetime) -> _Crew:
    """The slots that serve a queue, and how many jobs of it run."""
    slots = select(func.coalesce(func.sum(Worker.slots), 0))
    slots = slots.where(Worker.queues.any_() == queue, Worker.seen_at > seen_after)
    busy = select(func.count()).select_from(Job).where(IS_OWNED, Job.queue == queue)
    return _Crew(session.scalars(slots).one(), session.scalars(busy).one())


def _estimate(session: Session, job: Job, crew: _Crew, position: int) -> float | None:
    """Rounds of the crew until it is this job's turn, times how long such jobs took lately."""
    rounds = max(0, math.ceil((position - max(0, crew.slots - crew.busy)) / crew.slots))
    if rounds == 0:
        return 0.0
    recent = (
        select((Job.finished_at - Job.started_at).label("took"))
        .where(Job.tenant_id == job.tenant_id, Job.kind == job.kind, Job.state == JobState.SUCCEEDED)
        .order_by(Job.created_at.desc())
        .limit(RECENT)
        .subquery()
    )
    took: timedelta | None = session.scalars(select(func.avg(recent.c.took))).one()
    return None if took is None else rounds * took.total_seconds()
