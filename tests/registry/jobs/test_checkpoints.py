"""Checkpoints of a job: who may commit them, which are kept, and how long."""

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import select

from registry.db import SessionFactory, transaction
from registry.errors import BlobGone, FenceLost, InvalidCursor
from registry.jobs.cancel import request_cancel
from registry.jobs.checkpoints import (
    commit_checkpoint,
    list_checkpoints,
    mark_corrupt,
    newest_checkpoints,
    record_resume,
)
from registry.jobs.fail import fail
from registry.jobs.lease import release
from registry.models import Blob, Checkpoint, CheckpointFile, Job, JobAttempt, JobEvent, Version
from tests.factories import make_blob
from tests.registry.jobs.helpers import claim_one, claimed, make_due, publish, race, reload
from tests.registry.refs import assert_refs_match_rows


def commit(sessions: SessionFactory, job: Job, step: int, fence: int | None = None, **blob: Any) -> str:
    """Stores two blobs and commits them, as the worker that holds `fence` would."""
    with transaction(sessions) as session:
        files = {name: make_blob(session, job_id=job.id, **blob).id for name in ("checkpoint.json", "b.safetensors")}
    with transaction(sessions) as session:
        return commit_checkpoint(
            session,
            job_id=job.id,
            fence=fence or job.fence or 0,
            step=step,
            files=files,
            manifest={"files": sorted(files)},
            metrics={"train_loss": 1 / step},
        )


def kept(sessions: SessionFactory, job: Job) -> list[int]:
    with sessions() as session:
        found = newest_checkpoints(session, job.id, limit=100)
        assert all([file.path for file in row.files] == ["b.safetensors", "checkpoint.json"] for row in found)
        return [row.step for row in found]


def referenced(sessions: SessionFactory) -> int:
    """How many blobs checkpoints hold; the counts are compared with the rows on the way."""
    with sessions() as session:
        assert_refs_match_rows(session)
        return len(session.scalars(select(CheckpointFile.blob_id)).all())


def corrupt(sessions: SessionFactory, job: Job, step: int, fence: int | None = None) -> None:
    with transaction(sessions) as session:
        row = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == step)).one()
        mark_corrupt(session, job_id=job.id, fence=fence or job.fence or 0, checkpoint_id=row.id)


def resume(sessions: SessionFactory, job: Job, fence: int | None = None, **over: Any) -> None:
    values: dict[str, Any] = {"step": 3, "resume": "exact", "differences": [], **over}
    with transaction(sessions) as session:
        record_resume(session, job_id=job.id, fence=fence or job.fence or 0, **values)


def told(sessions: SessionFactory, job: Job, code: str) -> list[JobEvent]:
    with sessions() as session:
        query = select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.data["code"].astext == code)
        return list(session.scalars(query.order_by(JobEvent.id)))


def reclaimed(sessions: SessionFactory, job: Job) -> Job:
    """The same job, given back and claimed again."""
    with transaction(sessions) as session:
        release(session, job_id=job.id, fence=job.fence or 0)
    make_due(sessions)
    again = claim_one(sessions)
    assert again is not None
    return again


def test_a_committed_checkpoint_is_the_newest_and_is_told(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    assert commit(sessions, job, 5) == "ok"
    assert kept(sessions, job) == [5]
    assert referenced(sessions) == 2
    progress = reload(sessions, job.id).progress
    assert progress is not None
    assert progress["checkpoint_step"] == 5
    (event,) = told(sessions, job, "checkpoint_saved")
    assert (event.message, event.level, event.fence) == ("Checkpoint saved at step 5.", "info", job.fence)


def test_a_commit_sent_again_is_the_same_checkpoint(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    assert [commit(sessions, job, 5), commit(sessions, job, 5)] == ["ok", "replayed"]
    assert referenced(sessions) == 2
    assert len(told(sessions, job, "checkpoint_saved")) == 1


def test_two_commits_at_once_are_one(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    assert sorted(map(str, race(*[partial(commit, sessions, job, 5)] * 2))) == ["ok", "replayed"]
    assert referenced(sessions) == 2


@pytest.mark.parametrize("act", [partial(commit, step=6), partial(corrupt, step=5), resume])
def test_a_former_owner_changes_nothing(sessions: SessionFactory, act: Callable[..., Any]) -> None:
    job = claimed(sessions)
    commit(sessions, job, 5)
    again = reclaimed(sessions, job)
    with pytest.raises(FenceLost):
        act(sessions, again, fence=job.fence)
    assert kept(sessions, job) == [5]
    assert referenced(sessions) == 2


def test_a_resume_that_is_recorded_again_is_told_once(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    resume(sessions, job)
    resume(sessions, job)
    assert len(told(sessions, job, "resumed")) == 1
    resume(sessions, job, resume="best_effort", differences=["torch"])  # it began again, with other kernels
    assert len(told(sessions, job, "resumed")) == 2


def test_an_ended_job_takes_no_checkpoint(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    publish(sessions, job)
    with pytest.raises(FenceLost):
        commit(sessions, job, 5)


def test_bytes_that_are_being_collected_cannot_become_a_checkpoint(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    with pytest.raises(BlobGone):
        commit(sessions, job, 5, state="condemned")
    assert kept(sessions, job) == []


def test_the_two_furthest_are_kept(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    for step in (5, 10, 15):
        commit(sessions, job, step)
    assert kept(sessions, job) == [15, 10]
    assert referenced(sessions) == 4
    with sessions() as session:
        states = session.execute(select(Checkpoint.step, Checkpoint.state)).all()
    assert dict(map(tuple, states)) == {5: "pruned", 10: "committed", 15: "committed"}


def test_the_next_owner_may_save_the_same_step_again(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    commit(sessions, job, 5)
    again = reclaimed(sessions, job)
    assert commit(sessions, again, 5) == "ok"
    with sessions() as session:
        assert [row.fence for row in newest_checkpoints(session, job.id)] == [again.fence, job.fence]


def test_success_drops_all_of_them(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    other = claimed(sessions)
    for step in (5, 10):
        commit(sessions, job, step)
        commit(sessions, other, step)
    publish(sessions, job)
    assert kept(sessions, job) == []
    assert kept(sessions, other) == [10, 5]
    assert referenced(sessions) == 4
    with sessions() as session:
        files = {blob for (blob,) in session.execute(select(Blob.id).where(Blob.refs > 0))}
        assert session.scalars(select(Version)).one().job_id == job.id
        assert len(files) == 4 + 2 + 2  # the other's checkpoints, the version, the two base models


def test_failure_and_cancellation_keep_them(sessions: SessionFactory) -> None:
    failed, cancelled = claimed(sessions), claimed(sessions)
    for job in (failed, cancelled):
        commit(sessions, job, 5)
    with transaction(sessions) as session:
        fail(
            session,
            job_id=failed.id,
            fence=failed.fence or 0,
            error_class="diverged",
            code="training_diverged",
            message="the loss is nan",
            max_infra_failures=1,
        )
        request_cancel(session, tenant_id=cancelled.tenant_id, job_id=cancelled.id)
        release(session, job_id=cancelled.id, fence=cancelled.fence or 0)
    assert (reload(sessions, failed.id).state, reload(sessions, cancelled.id).state) == ("failed", "cancelled")
    assert (kept(sessions, failed), kept(sessions, cancelled)) == ([5], [5])


def test_only_new_ground_gives_the_failure_budget_back(sessions: SessionFactory) -> None:
    job = claimed(sessions)

    def failures_after(step: int) -> int:
        with transaction(sessions) as session:
            session.get_one(Job, job.id).infra_failures = 3
        commit(sessions, job, step)
        return reload(sessions, job.id).infra_failures

    assert failures_after(10) == 0
    assert failures_after(5) == 3  # a run that fell back repeats what was there before
    assert failures_after(11) == 0


def test_a_damaged_checkpoint_is_never_tried_again(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    for step in (5, 10):
        commit(sessions, job, step)
    corrupt(sessions, job, 10)
    assert kept(sessions, job) == [5]
    assert referenced(sessions) == 2
    corrupt(sessions, job, 10)
    (event,) = told(sessions, job, "checkpoint_corrupt")
    assert (event.level, event.data) == ("warn", {"code": "checkpoint_corrupt", "step": 10})


def test_nobody_can_condemn_the_checkpoint_of_another_job(sessions: SessionFactory) -> None:
    mine, other = claimed(sessions), claimed(sessions)
    commit(sessions, other, 5)
    with transaction(sessions) as session:
        row = session.scalars(select(Checkpoint)).one()
        mark_corrupt(session, job_id=mine.id, fence=mine.fence or 0, checkpoint_id=row.id)
    assert kept(sessions, other) == [5]


def test_how_an_attempt_went_on_is_in_its_row_and_told(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    resume(sessions, job)
    again = reclaimed(sessions, job)
    resume(sessions, again, resume="best_effort", differences=["torch 2 → 3", "threads 1 → 2"])
    with sessions() as session:
        rows = session.scalars(select(JobAttempt).order_by(JobAttempt.attempt)).all()
        assert [row.resume for row in rows] == ["exact", "best_effort"]
    assert [event.message for event in told(sessions, job, "resumed")] == [
        "Resumed at step 3 (exact).",
        "Resumed at step 3 (best_effort: torch 2 → 3; threads 1 → 2).",
    ]


def test_pages_go_on_behind_a_checkpoint_that_was_pruned(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    for step in (5, 10, 15):
        commit(sessions, job, step)
    with sessions() as session:
        by_step = {row.step: row for row in session.scalars(select(Checkpoint))}
        first = list_checkpoints(session, job_id=job.id, limit=1)
        assert ([row.step for row in first.items], first.has_more) == ([15], True)
        second = list_checkpoints(session, job_id=job.id, limit=1, after=by_step[15].id)
        assert ([row.step for row in second.items], second.has_more) == ([10], False)
        assert list_checkpoints(session, job_id=job.id, limit=1, after=by_step[5].id).items == []
        with pytest.raises(InvalidCursor):
            list_checkpoints(session, job_id=job.id, limit=1, after=uuid.uuid4())


def test_a_cursor_of_another_job_is_refused(sessions: SessionFactory) -> None:
    mine, other = claimed(sessions), claimed(sessions)
    commit(sessions, other, 5)
    with sessions() as session, pytest.raises(InvalidCursor):
        list_checkpoints(session, job_id=mine.id, limit=1, after=session.scalars(select(Checkpoint.id)).one())
