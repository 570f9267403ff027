"""Garbage collection of bytes nobody refers to: condemn → grace → sweep. Rows that served their time go, too.

A condemned blob can no longer be referred to, so it can be deleted later without a race: whoever wanted it finds
BlobGone and stores the bytes again. The grace outlives every download link and every transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, delete, exists, func, select, update
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.failpoints import hit
from registry.jobs.checkpoints import IS_COMMITTED, prune_checkpoints
from registry.jobs.clock import NOW
from registry.jobs.conditions import IS_OWNED
from registry.jobs.moves import lock_job
from registry.jobs.states import JobState
from registry.models import Blob, Checkpoint, IdempotencyKey, Job, Outbox, WebhookDelivery
from registry.storage import ObjectStore

BATCH = 200
KEEP_CHECKPOINTS_SECONDS = 7 * 24 * 3600.0
KEPT = timedelta(hours=72)  # sent wake-ups, and how long a request can be repeated under its key


@dataclass(frozen=True, slots=True)
class Amount:
    """So many objects and their bytes."""

    objects: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Survey:
    """What a collection that began now would do."""

    condemn: Amount
    sweep: Amount


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did."""

    condemned: Amount
    freed: Amount
    purged_rows: int


def collect(
    sessions: SessionFactory,
    store: ObjectStore,
    *,
    grace_seconds: float,
    checkpoints_seconds: float = KEEP_CHECKPOINTS_SECONDS,
) -> Collected:
    """Drops the checkpoints of jobs that ended without success that long ago; condemns what has been unreferenced since
    its making and is older than the grace, deletes what was condemned for as long as that, and purges old rows. Any
    number of collectors may run at once."""
    grace = timedelta(seconds=grace_seconds)
    forget_checkpoints(sessions, older_than=timedelta(seconds=checkpoints_seconds))
    with transaction(sessions) as session:
        condemned = condemn(session, grace=grace)
    hit("gc.condemned")
    freed = sweep(sessions, store, grace=grace)
    with transaction(sessions) as session:
        purged = purge(session)
    return Collected(condemned, freed, purged)


def survey(session: Session, *, grace_seconds: float) -> Survey:
    """The dry run: counts, and changes nothing."""
    grace = timedelta(seconds=grace_seconds)
    return Survey(_amount(session, _garbage(grace)), _amount(session, _ripe(grace)))


def forget_checkpoints(sessions: SessionFactory, *, older_than: timedelta) -> int:
    """Drops the checkpoints of jobs that failed or were cancelled, one job at a time; answers how many. Versions that
    were published from them keep their files."""
    left = exists().where(Checkpoint.job_id == Job.id, IS_COMMITTED)
    ended = Job.state.in_((JobState.FAILED, JobState.CANCELLED)) & (Job.finished_at < NOW - older_than)
    with transaction(sessions) as session:
        job_ids = session.scalars(select(Job.id).where(ended, left)).all()
    forgotten = 0
    for job_id in job_ids:
        with transaction(sessions) as session:
            lock_job(session, job_id)
            forgotten += prune_checkpoints(session, job_id, keep=0)
    return forgotten


def condemn(session: Session, *, grace: timedelta) -> Amount:
    """Marks garbage, so that nobody can refer to it any more. Bytes of an attempt that still runs are spared."""
    found = select(Blob.id).where(_garbage(grace)).with_for_update(skip_locked=True)
    # `refs = 0` once more: a reference taken since the rows were read shows in the row that is updated.
    marked = update(Blob).where(Blob.id.in_(found), Blob.refs == 0).values(state="condemned", condemned_at=NOW)
    options = {"synchronize_session": False}
    sizes = session.scalars(marked.returning(Blob.size), execution_options=options).all()
    return Amount(len(sizes), sum(sizes))


def sweep(sessions: SessionFactory, store: ObjectStore, *, grace: timedelta) -> Amount:
    """Deletes the bytes of what was condemned long enough ago. No transaction is open while the store works; deleting
    twice, after a crash or beside another collector, changes nothing."""
    objects = freed = 0
    while True:
        with transaction(sessions) as session:
            due = select(Blob.id, Blob.key).where(_ripe(grace)).order_by(Blob.condemned_at, Blob.id).limit(BATCH)
            batch = session.execute(due).all()
        if not batch:
            return Amount(objects, freed)
        for row in batch:
            store.delete(row.key)
            hit("gc.after_delete")
        with transaction(sessions) as session:
            sizes = _mark_deleted(session, [row.id for row in batch])
        objects, freed = objects + len(sizes), freed + sum(sizes)


def purge(session: Session) -> int:
    """Drops wake-ups that were sent, webhook deliveries that ended and idempotency keys, each after three days; answers
    how many rows."""
    told = delete(WebhookDelivery).where(WebhookDelivery.ended_at < NOW - KEPT).returning(WebhookDelivery.id)
    sent = delete(Outbox).where(Outbox.sent_at < NOW - KEPT).returning(Outbox.id)
    keys = delete(IdempotencyKey).where(IdempotencyKey.created_at < NOW - KEPT)
    options = {"synchronize_session": False}
    gone = len(session.execute(sent, execution_options=options).all())
    gone += len(session.execute(told, execution_options=options).all())
    return gone + len(session.execute(keys.returning(IdempotencyKey.key), execution_options=options).all())


def _garbage(grace: timedelta) -> ColumnElement[bool]:
    writing = exists().where(Job.id == Blob.job_id, Job.fence == Blob.fence, IS_OWNED)
    unreferenced = Blob.state.in_(("intent", "stored")) & (Blob.refs == 0)
    return unreferenced & (Blob.created_at < NOW - grace) & ~writing


def _ripe(grace: timedelta) -> ColumnElement[bool]:
    return (Blob.state == "condemned") & (Blob.refs == 0) & (Blob.condemned_at < NOW - grace)


def _mark_deleted(session: Session, blob_ids: Sequence[object]) -> Sequence[int]:
    """The sizes of those that nobody else had marked."""
    gone = update(Blob).where(Blob.id.in_(blob_ids), Blob.state == "condemned").values(state="deleted")
    return session.scalars(gone.returning(Blob.size), execution_options={"synchronize_session": False}).all()


def _amount(session: Session, condition: ColumnElement[bool]) -> Amount:
    count = select(func.count(), func.coalesce(func.sum(Blob.size), 0)).where(condition)
    objects, size = session.execute(count).one()
    return Amount(objects, int(size))
