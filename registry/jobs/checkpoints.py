"""Where an interrupted job goes on from. Committed by its owner, taken up by the next one, dropped when it succeeds.

A job that failed or was cancelled keeps its last ones, so that its training is not lost with it: for as long as the
garbage collection lets them."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import delete, func, literal, select, update
from sqlalchemy.orm import Session, selectinload

from registry.blobs import drop_refs, take_refs
from registry.jobs.events import NewEvent, add_events
from registry.jobs.moves import lock_owned
from registry.models import Checkpoint, CheckpointFile, JobAttempt
from registry.paging import Page, page_by_age

KEPT = 2  # the newest, and one to fall back to

Resume = Literal["exact", "best_effort"]

# A literal, because a plan for any parameter cannot use the partial index.
IS_COMMITTED = Checkpoint.state == literal("committed", literal_execute=True)


def commit_checkpoint(
    session: Session,
    *,
    job_id: uuid.UUID,
    fence: int,
    step: int,
    files: Mapping[str, uuid.UUID],
    manifest: dict[str, Any],
    metrics: dict[str, Any],
    merge_recipe: str | None = None,
) -> Literal["ok", "replayed"]:
    """Makes these stored blobs the job's newest checkpoint, and prunes; FenceLost when it is no longer this owner's.

    A step that no attempt had reached before is progress: it gives the job its whole budget of failures back."""
    job = lock_owned(session, job_id, fence)
    made = select(Checkpoint.id).where(Checkpoint.job_id == job_id, Checkpoint.fence == fence, Checkpoint.step == step)
    if session.scalar(made) is not None:
        return "replayed"
    furthest = session.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job_id))
    if furthest is None or step > furthest:
        job.infra_failures = 0
    take_refs(session, files.values())
    checkpoint = Checkpoint(
        job_id=job_id, fence=fence, step=step, manifest=manifest, metrics=metrics, merge_recipe=merge_recipe
    )
    session.add(checkpoint)
    session.flush()
    session.add_all(
        CheckpointFile(checkpoint_id=checkpoint.id, path=path, blob_id=blob) for path, blob in files.items()
    )
    job.progress = {**(job.progress or {}), "checkpoint_step": step}
    _tell(session, job_id, fence, "info", f"Checkpoint saved at step {step}.", code="checkpoint_saved", step=step)
    prune_checkpoints(session, job_id, keep=KEPT)
    return "ok"


def newest_checkpoints(session: Session, job_id: uuid.UUID, *, limit: int = KEPT) -> list[Checkpoint]:
    """What the job can go on from, furthest first, with files."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, IS_COMMITTED)
    query = query.order_by(Checkpoint.step.desc(), Checkpoint.fence.desc()).limit(limit)
    return list(session.scalars(query.options(selectinload(Checkpoint.files))))


def list_checkpoints(
    session: Session, *, job_id: uuid.UUID, after: uuid.UUID | None = None, limit: int
) -> Page[Checkpoint]:
    """The checkpoints whose bytes are kept, newest first; `after` may be one that was pruned meanwhile."""
    anchors = select(Checkpoint).where(Checkpoint.job_id == job_id)
    return page_by_age(session, anchors.where(IS_COMMITTED), Checkpoint, after=after, limit=limit, anchors=anchors)


def mark_corrupt(session: Session, *, job_id: uuid.UUID, fence: int, checkpoint_id: uuid.UUID) -> None:
    """The job's owner found that these bytes are damaged or gone: nobody shall try them again. FenceLost."""
    lock_owned(session, job_id, fence)
    step = session.scalar(
        update(Checkpoint)
        .where(Checkpoint.id == checkpoint_id, Checkpoint.job_id == job_id, IS_COMMITTED)
        .values(state="corrupt", merge_recipe=None)
        .returning(Checkpoint.step)
    )
    if step is None:
        return
    _drop_files(session, [checkpoint_id])
    told = f"The checkpoint of step {step} is damaged; an earlier one is used, or none."
    _tell(session, job_id, fence, "warn", told, code="checkpoint_corrupt", step=step)


def record_resume(
    session: Session, *, job_id: uuid.UUID, fence: int, step: int, resume: Resume, differences: Sequence[str]
) -> None:
    """The owner's attempt went on from `step`: with the same bits, or as well as the `differences` allow. FenceLost."""
    job = lock_owned(session, job_id, fence)
    attempt = update(JobAttempt).where(JobAttempt.job_id == job_id, JobAttempt.attempt == job.attempt)
    noted = attempt.where(JobAttempt.resume.is_distinct_from(resume)).values(resume=resume)
    if session.scalar(noted.returning(JobAttempt.job_id)) is None:
        return  # the answer to an earlier call got lost
    told = f"Resumed at step {step} (exact)."
    if resume == "best_effort":
        told = f"Resumed at step {step} (best_effort: {'; '.join(differences)})."
    data = {"step": step, "resume": resume, "differences": list(differences)}
    _tell(session, job_id, fence, "info", told, code="resumed", **data)


def prune_checkpoints(session: Session, job_id: uuid.UUID, *, keep: int) -> int:
    """Drops the files of all but the `keep` furthest checkpoints; answers how many. The caller holds the job's lock."""
    query = select(Checkpoint.id).where(Checkpoint.job_id == job_id, IS_COMMITTED)
    surplus = session.scalars(query.order_by(Checkpoint.step.desc(), Checkpoint.fence.desc()).offset(keep)).all()
    session.execute(update(Checkpoint).where(Checkpoint.id.in_(surplus)).values(state="pruned", merge_recipe=None))
    _drop_files(session, surplus)
    return len(surplus)


def _drop_files(session: Session, checkpoint_ids: Sequence[uuid.UUID]) -> None:
    dropped = delete(CheckpointFile).where(CheckpointFile.checkpoint_id.in_(checkpoint_ids))
    drop_refs(session, session.scalars(dropped.returning(CheckpointFile.blob_id)).all())


def _tell(
    session: Session, job_id: uuid.UUID, fence: int, level: Literal["info", "warn"], message: str, **data: Any
) -> None:
    add_events(session, job_id, fence, [NewEvent("message", level, message, data)])
