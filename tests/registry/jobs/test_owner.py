"""What an owner may do, and a former owner may not."""

import random
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.errors import BlobGone, CancelRequested, FenceLost, JobNotFound, JobTerminal
from registry.jobs.cancel import request_cancel
from registry.jobs.events import NewEvent, list_events
from registry.jobs.fail import RETRIES, fail
from registry.jobs.lease import heartbeat, release
from registry.jobs.publish import Published, manifest_digest, publish_merge, publish_version
from registry.jobs.reaper import tick
from registry.jobs.spec import MergeOptions
from registry.jobs.states import JobState
from registry.jobs.submit import submit_merge
from registry.jobs.suggest import suggest_patch
from registry.models import Blob, Job, JobEvent, LineageEdge, Merge, MergeFile, Outbox, Version, VersionFile
from tests.factories import make_adapter, make_blob, make_file, make_job, make_tenant, make_version
from tests.registry.jobs.helpers import (
    LEASE,
    claim_one,
    claimed,
    expire_lease,
    make_due,
    publish,
    queue_jobs,
    race,
    reload,
)


def beat(sessions: SessionFactory, job: Job, fence: int | None = None, **over: Any) -> bool:
    with transaction(sessions) as session:
        values = {"lease_seconds": LEASE, "progress": None, **over}
        return heartbeat(session, job_id=job.id, fence=fence or job.fence or 0, **values).cancel


def break_off(sessions: SessionFactory, job: Job, error_class: Any = "infra", **over: Any) -> JobState:
    with transaction(sessions) as session:
        values = {"code": "some_code", "message": "it broke", "max_infra_failures": 10, **over}
        return fail(session, job_id=job.id, fence=job.fence or 0, error_class=error_class, **values)


def let_go(sessions: SessionFactory, job: Job) -> JobState:
    with transaction(sessions) as session:
        return release(session, job_id=job.id, fence=job.fence or 0)


def cancel(sessions: SessionFactory, job: Job) -> str:
    with transaction(sessions) as session:
        return request_cancel(session, tenant_id=job.tenant_id, job_id=job.id).state


def reap(sessions: SessionFactory, **over: Any) -> int:
    """A tick after the hold is over."""
    with transaction(sessions) as session:
        values = {"lease_seconds": 0.0, "reaper_seconds": 3600.0, "max_infra_failures": 10, **over}
        return tick(session, **values)


OWNER_ACTIONS: list[Callable[[SessionFactory, Job], object]] = [beat, publish, break_off, let_go]


@pytest.mark.parametrize("act", OWNER_ACTIONS)
def test_an_owner_whose_job_was_reaped_changes_nothing(
    sessions: SessionFactory, act: Callable[[SessionFactory, Job], object]
) -> None:
    job = claimed(sessions)
    expire_lease(sessions, job.id)
    assert reap(sessions) == 1
    before = reload(sessions, job.id)
    with pytest.raises(FenceLost):
        act(sessions, job)
    make_due(sessions)
    second = claim_one(sessions, "worker-2")
    assert second is not None and second.fence is not None and job.fence is not None
    assert job.fence < (before.fence or 0) < second.fence
    with pytest.raises(FenceLost):
        act(sessions, job)
    after = reload(sessions, job.id)
    assert (after.state, after.worker, after.fence) == ("running", "worker-2", second.fence)


@pytest.mark.parametrize("act", OWNER_ACTIONS)
def test_an_owner_that_let_go_changes_nothing(
    sessions: SessionFactory, act: Callable[[SessionFactory, Job], object]
) -> None:
    job = claimed(sessions)
    assert let_go(sessions, job) == "queued"
    with pytest.raises(FenceLost):
        act(sessions, job)


def test_a_heartbeat_extends_the_lease_and_stores_progress(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    expire_lease(sessions, job.id)  # run out, not yet collected: the fence decides
    point = NewEvent("metrics", "info", "step 3", {"loss": 0.5})
    assert beat(sessions, job, progress={"step": 3}, events=[point]) is False
    assert reap(sessions) == 0
    assert reload(sessions, job.id).progress == {"step": 3}
    beat(sessions, job, progress=None)
    assert reload(sessions, job.id).progress == {"step": 3}
    with sessions() as session:
        newest = list_events(session, job_id=job.id, after=None, limit=1).items[0]
    assert (newest.type, newest.message, newest.data, newest.fence) == ("metrics", "step 3", {"loss": 0.5}, job.fence)


def test_a_heartbeat_that_lost_its_fence_stores_no_events(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    with pytest.raises(FenceLost):
        beat(sessions, job, fence=(job.fence or 0) + 1, events=[NewEvent("message", "info", "ghost")])
    with sessions() as session:
        assert "ghost" not in session.scalars(select(JobEvent.message)).all()


def test_events_that_are_sent_again_are_stored_once(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    a, b, c, d = (NewEvent("message", "info", text) for text in "abcd")
    beat(sessions, job, events=[a, b], events_made=2)
    beat(sessions, job, events=[a, b], events_made=2)
    beat(sessions, job, events=[b, c], events_made=3)
    beat(sessions, job, events=[], events_made=3)
    let_go(sessions, job)
    make_due(sessions)
    again = claim_one(sessions)
    assert again is not None
    beat(sessions, again, events=[d], events_made=1)  # another owner counts for itself
    with sessions() as session:
        stored = select(JobEvent.message).where(JobEvent.job_id == job.id, JobEvent.type == "message")
        assert [text for text in session.scalars(stored.order_by(JobEvent.id)) if len(text) == 1] == [
            "a",
            "b",
            "c",
            "d",
        ]


# ── publish ──────────────────────────────────────────────────────────────────────────────────────


def test_publishing_twice_with_one_fence_gives_the_same_version(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    assert publish(sessions, job) == Published(1, replayed=False)
    assert publish(sessions, job) == Published(1, replayed=True)
    with sessions() as session:
        version = session.scalars(select(Version)).one()
        assert (version.version, version.job_id, version.fence) == (1, job.id, job.fence)
        assert version.digest == manifest_digest(version.manifest)
        assert version.adapter.next_version == 2
        blobs = session.scalars(select(VersionFile.blob_id)).all()
        assert len(blobs) == 2
        assert set(session.scalars(select(Blob.refs).where(Blob.id.in_(blobs)))) == {1}
    stored = reload(sessions, job.id)
    assert (stored.state, stored.trained_tokens, stored.lease_expires_at) == ("succeeded", 128, None)


def test_one_owner_publishing_from_two_threads_makes_one_version(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    results = race(*[partial(publish, sessions, job)] * 6)
    assert sorted(r.replayed for r in results if isinstance(r, Published)) == [False] + [True] * 5
    with sessions() as session:
        assert len(session.scalars(select(Version)).all()) == 1


def test_a_version_knows_what_it_was_made_from(session: Session) -> None:
    tenant = make_tenant(session)
    adapter = make_adapter(session, tenant)
    train, valid = make_file(session, tenant), make_file(session, tenant)
    files = {"training_file_id": train.id, "validation_file_id": valid.id}
    job = make_job(session, adapter, state="running", **files)
    publish_version(
        session, job_id=job.id, fence=job.fence or 0, files={}, manifest={}, metrics=None, trained_tokens=None
    )
    edges = {(e.relation, e.parent_kind, e.parent_id, e.parent_digest) for e in session.scalars(select(LineageEdge))}
    assert edges == {
        ("trained_on", "file", train.id, train.blob.sha256),
        ("validated_on", "file", valid.id, valid.blob.sha256),
        ("based_on", "base_model", adapter.base_model_id, adapter.base_model.digest),
    }


def test_a_version_of_missing_bytes_is_not_published_at_all(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    with transaction(sessions) as session:
        good = make_blob(session)
        condemned = make_blob(session, state="condemned")
    files = {"a": good.id, "b": condemned.id}
    with pytest.raises(BlobGone), transaction(sessions) as session:
        publish_version(
            session,
            job_id=job.id,
            fence=job.fence or 0,
            files=files,
            manifest={},
            metrics=None,
            trained_tokens=None,
        )
    assert reload(sessions, job.id).state == "running"
    with sessions() as session:
        assert session.get_one(Blob, good.id).refs == 0
        assert session.scalars(select(Version)).all() == []
    assert publish(sessions, job).version == 1


def test_numbers_have_no_gaps_and_are_not_reused(sessions: SessionFactory) -> None:
    adapter = queue_jobs(sessions, 12)
    jobs = [job for _ in range(12) if (job := claim_one(sessions))]
    race(*(partial(publish, sessions, job) for job in jobs[:4]))
    for job in jobs[4:6]:
        break_off(sessions, job, "user")
    with pytest.raises(ZeroDivisionError), transaction(sessions) as session:
        publish_version(
            session, job_id=jobs[6].id, fence=jobs[6].fence or 0, files={}, manifest={}, metrics=None, trained_tokens=1
        )
        raise ZeroDivisionError  # a number taken by a transaction that was lost is not lost
    with transaction(sessions) as session:
        last = session.scalars(select(Version).order_by(Version.version.desc()).limit(1)).one()
        last.deleted_at = last.created_at
    results = race(*(partial(publish, sessions, job) for job in jobs[6:]))
    assert sorted(r.version for r in results if isinstance(r, Published)) == [5, 6, 7, 8, 9, 10]
    with sessions() as session:
        assert session.get_one(type(adapter), adapter.id).next_version == 11


def test_of_publish_and_cancel_exactly_one_wins(sessions: SessionFactory) -> None:
    rounds = 40
    adapter = queue_jobs(sessions, rounds)
    outcomes = []
    for _ in range(rounds):
        job = claim_one(sessions)
        assert job is not None
        contenders = [partial(publish, sessions, job), partial(cancel, sessions, job)]
        random.shuffle(contenders)
        results = race(*contenders)
        published = [r for r in results if isinstance(r, Published)]
        cancelled = [r for r in results if r == "cancelling"]
        assert len(published) + len(cancelled) == 1
        loser = next(r for r in results if isinstance(r, Exception))
        assert isinstance(loser, JobTerminal if published else CancelRequested)
        assert reload(sessions, job.id).state == ("succeeded" if published else "cancelling")
        outcomes.append(bool(published))
    with sessions() as session:
        numbers = session.scalars(select(Version.version).order_by(Version.version)).all()
        assert list(numbers) == list(range(1, sum(outcomes) + 1))
        assert session.get_one(type(adapter), adapter.id).next_version == sum(outcomes) + 1


# ── merges ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def merge_job(sessions: SessionFactory) -> Job:
    """A claimed merge job with its merge row."""
    with transaction(sessions) as session:
        version = make_version(session, make_adapter(session, make_tenant(session)))
        job = submit_merge(session, version=version, options=MergeOptions())
        session.add(Merge(tenant_id=job.tenant_id, version_id=version.id, dtype="base", job_id=job.id))
    claimed = claim_one(sessions)
    assert claimed is not None and claimed.id == job.id
    return claimed


def finish_merge(sessions: SessionFactory, job: Job) -> bool:
    with transaction(sessions) as session:
        files = {"model.safetensors": make_blob(session).id}
        fence = job.fence or 0
        return publish_merge(session, job_id=job.id, fence=fence, files=files, digest="0" * 64, report={"lost": 0})


def test_publishing_a_merge_twice_changes_nothing(sessions: SessionFactory, merge_job: Job) -> None:
    assert finish_merge(sessions, merge_job) is False
    assert finish_merge(sessions, merge_job) is True
    with sessions() as session:
        merge = session.scalars(select(Merge)).one()
        assert (merge.live, merge.digest, merge.report, merge.job.state) == (True, "0" * 64, {"lost": 0}, "succeeded")
        assert len(session.scalars(select(MergeFile)).all()) == 1
        edges = {(e.child_kind, e.child_id, e.relation, e.parent_kind) for e in session.scalars(select(LineageEdge))}
    assert edges == {
        ("merge", merge.id, "merged_from", "version"),
        ("merge", merge.id, "based_on", "base_model"),
    }


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_a_merge_that_ends_badly_makes_room_for_another(sessions: SessionFactory, merge_job: Job, how: str) -> None:
    if how == "cancelled":
        cancel(sessions, merge_job)
    assert break_off(sessions, merge_job, "user") == how
    with sessions() as session:
        assert session.scalars(select(Merge.live)).one() is False


def test_a_merge_that_is_retried_stays_the_live_one(sessions: SessionFactory, merge_job: Job) -> None:
    assert break_off(sessions, merge_job, "infra") == "queued"
    with sessions() as session:
        assert session.scalars(select(Merge.live)).one() is True


# ── fail, release ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error_class", ["user", "diverged", "oom"])
def test_what_would_only_repeat_itself_fails_at_once(sessions: SessionFactory, error_class: str) -> None:
    job = claimed(sessions)
    assert break_off(sessions, job, error_class, message="bad\0 row \ud800") == "failed"
    stored = reload(sessions, job.id)
    assert (stored.state, stored.error_class, stored.error_code) == ("failed", error_class, "some_code")
    assert stored.error_message == "bad\N{REPLACEMENT CHARACTER} row ?"
    assert stored.finished_at is not None


def test_infra_failures_are_retried_with_growing_delay_until_the_budget_is_spent(sessions: SessionFactory) -> None:
    queue_jobs(sessions)
    delays = []
    for _ in range(3):
        make_due(sessions)
        job = claim_one(sessions)
        assert job is not None
        assert break_off(sessions, job, "infra", max_infra_failures=3) == "queued"
        assert claim_one(sessions) is None
        stored = reload(sessions, job.id)
        with sessions() as session:
            ended = select(JobEvent.created_at).order_by(JobEvent.id.desc()).limit(1)
            delays.append(round((stored.run_after - session.scalars(ended).one()).total_seconds() / 5))
            wake = session.scalars(select(Outbox).order_by(Outbox.id.desc()).limit(1)).one()
        assert (wake.job_id, wake.next_at) == (job.id, stored.run_after)
    assert delays == [1, 2, 4]
    make_due(sessions)
    job = claim_one(sessions)
    assert job is not None
    assert break_off(sessions, job, "infra", max_infra_failures=3) == "failed"


@pytest.mark.parametrize(("error_class", "retries"), [("bug", 2), ("host_oom", 2), ("native_crash", 1)])
def test_some_failures_are_retried_a_little_and_do_not_touch_the_infra_budget(
    sessions: SessionFactory, error_class: str, retries: int
) -> None:
    queue_jobs(sessions)
    ends = []
    for _ in range(retries + 1):
        make_due(sessions)
        job = claim_one(sessions)
        assert job is not None
        ends.append(break_off(sessions, job, error_class))
    assert ends == ["queued"] * RETRIES[error_class] + ["failed"] == ["queued"] * retries + ["failed"]
    assert reload(sessions, job.id).infra_failures == 0


Crash = tuple[str, str, int | None]  # class, code, last step; "" as class: given back


def crashes(sessions: SessionFactory, *story: Crash) -> tuple[list[JobState], Job]:
    """Where each ending took the job, and the job."""
    queue_jobs(sessions)
    ends = []
    for error_class, code, step in story:
        make_due(sessions)
        job = claim_one(sessions)
        assert job is not None
        beat(sessions, job, progress=None if step is None else {"step": step})
        ends.append(break_off(sessions, job, error_class, code=code) if error_class else let_go(sessions, job))
    return ends, reload(sessions, job.id)


KILLED: Crash = ("infra", "trainer_killed", 7)


def test_what_crashes_at_one_step_three_times_is_a_crash_loop(sessions: SessionFactory) -> None:
    ends, job = crashes(sessions, KILLED, ("native_crash", "trainer_crashed", 7), ("infra", "stalled", 7))
    assert ends == ["queued", "queued", "failed"]
    assert (job.error_class, job.error_code) == ("crash_loop", "crash_loop")
    assert "3 times at step 7" in (job.error_message or "")


def test_a_checkpoint_to_go_on_from_counts_as_the_step(sessions: SessionFactory) -> None:
    queue_jobs(sessions)
    for _ in range(3):
        make_due(sessions)
        job = claim_one(sessions)
        assert job is not None
        beat(sessions, job, progress={"checkpoint_step": 7})  # it crashes before the first step of its own
        state = break_off(sessions, job, "infra", code="trainer_killed")
    assert state == "failed"


@pytest.mark.parametrize(
    "story",
    [
        (KILLED, KILLED, ("infra", "trainer_killed", 8)),
        (KILLED, ("infra", "storage_unavailable", 7), KILLED, KILLED),
        (("infra", "trainer_killed", None),) * 4,
        (("infra", "storage_unavailable", 7),) * 4,
    ],
)
def test_other_rows_of_failures_are_not(sessions: SessionFactory, story: tuple[Crash, ...]) -> None:
    assert set(crashes(sessions, *story)[0]) == {"queued"}


def test_an_attempt_that_was_given_back_does_not_break_the_row(sessions: SessionFactory) -> None:
    assert crashes(sessions, KILLED, ("", "", 7), KILLED, KILLED)[0][-1] == "failed"


def test_running_the_machine_out_of_memory_twice_at_one_step_is_enough(sessions: SessionFactory) -> None:
    out: Crash = ("host_oom", "host_out_of_memory", 3)
    ends, job = crashes(sessions, out, out)
    assert ends == ["queued", "failed"]
    assert (job.error_class, job.error_code) == ("host_oom", "host_out_of_memory")
    smaller = {"op": "add", "path": "/hyperparameters", "value": {"batch_size": 4}}
    assert suggest_patch(job, context_length=None) == [smaller]


def test_a_drain_costs_nothing(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    for _ in range(15):
        assert let_go(sessions, job) == "queued"
        again = claim_one(sessions)
        assert again is not None and again.id == job.id
        job = again
    stored = reload(sessions, job.id)
    assert (stored.infra_failures, stored.attempt, stored.error_class) == (0, 16, None)


# ── cancel ───────────────────────────────────────────────────────────────────────────────────────


def test_cancelling_a_queued_job_ends_it(sessions: SessionFactory) -> None:
    queue_jobs(sessions)
    with sessions() as session:
        job = session.scalars(select(Job)).one()
    assert cancel(sessions, job) == "cancelled"
    assert cancel(sessions, job) == "cancelled"
    assert claim_one(sessions) is None


@pytest.mark.parametrize("leave", [let_go, break_off, partial(break_off, error_class="bug")])
def test_a_cancelled_worker_hears_of_it_and_any_exit_ends_the_job(
    sessions: SessionFactory, leave: Callable[[SessionFactory, Job], JobState]
) -> None:
    job = claimed(sessions)
    assert cancel(sessions, job) == cancel(sessions, job) == "cancelling"
    assert beat(sessions, job) is True
    with pytest.raises(CancelRequested):
        publish(sessions, job)
    assert leave(sessions, job) == "cancelled"
    assert reload(sessions, job.id).finished_at is not None


def test_cancelling_what_has_ended_is_refused(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    publish(sessions, job)
    with pytest.raises(JobTerminal):
        cancel(sessions, job)


def test_another_tenant_cannot_cancel(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    with pytest.raises(JobNotFound), transaction(sessions) as session:
        request_cancel(session, tenant_id=uuid.uuid4(), job_id=job.id)
    assert reload(sessions, job.id).state == "running"


def test_of_claim_and_cancel_neither_is_lost(sessions: SessionFactory) -> None:
    for _ in range(15):
        queue_jobs(sessions)
        with sessions() as session:
            job = session.scalars(select(Job).where(Job.state == "queued")).one()
        taken, answer = race(lambda: claim_one(sessions), partial(cancel, sessions, job))
        assert (taken is None, answer) in [(True, "cancelled"), (False, "cancelling")]
        assert reload(sessions, job.id).state == answer
