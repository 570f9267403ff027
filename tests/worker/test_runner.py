"""From claim to ending, in this process and on real Postgres; the child is a stand-in with chosen endings."""

import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from registry.db import transaction
from registry.errors import StorageUnavailable
from registry.models import Blob, Job, VersionFile, fence_seq
from registry.storage import ObjectStore
from tests.worker import fake_child
from tests.worker.depot import Depot, is_alive, metrics_of, wait_until
from worker.base_cache import BaseCache
from worker.host import Host
from worker.runner import Runner


def ended(depot: Depot, job_id: uuid.UUID) -> Job:
    """The job once no worker owns it any more."""
    states = {"succeeded", "failed", "cancelled", "queued"}
    return wait_until(lambda: (job := depot.job(job_id)).attempt > 0 and job.state in states and job)


def test_a_job_is_published_with_its_story(depot: Depot, runner: Runner) -> None:
    job_id = depot.submit()
    job = ended(depot, job_id)
    assert (job.state, job.trained_tokens, job.attempt) == ("succeeded", 7, 1)
    assert job.progress is not None
    assert (job.progress["step"], job.progress["total_steps"]) == (3, 3)
    events = depot.events(job_id)
    assert any(event.message == "Attempt 1 started on worker test-host:1:abc." for event in events)
    assert [point["step"] for point in metrics_of(events)] == [1, 3]
    assert [version.job_id for version in depot.versions()] == [job_id]


def test_slots_work_side_by_side(depot: Depot, runner: Runner) -> None:
    blocked = depot.submit(seed=fake_child.LONG, adapter="blocked")
    wait_until(lambda: depot.job(blocked).state == "running")
    assert ended(depot, depot.submit(adapter="free")).state == "succeeded"


def test_cancel_ends_a_running_job_and_publishes_nothing(depot: Depot, runner: Runner) -> None:
    job_id = depot.submit(seed=fake_child.LONG)
    wait_until(lambda: metrics_of(depot.events(job_id)))
    depot.cancel(job_id)
    assert ended(depot, job_id).state == "cancelled"
    assert depot.versions() == []


def test_a_paused_job_waits_in_the_queue_until_it_is_resumed(depot: Depot, runner: Runner) -> None:
    job_id = depot.submit(seed=fake_child.LONG)
    wait_until(lambda: metrics_of(depot.events(job_id)))
    depot.pause(job_id)
    job = ended(depot, job_id)
    assert (job.state, job.attempt, job.infra_failures) == ("queued", 1, 0)
    assert ended(depot, depot.submit(adapter="other")).state == "succeeded"  # the slot is free
    assert depot.job(job_id).state == "queued"
    depot.resume(job_id)
    wait_until(lambda: depot.job(job_id).attempt == 2)


def test_a_child_that_ignores_sigterm_is_killed(depot: Depot, runner: Runner) -> None:
    job_id = depot.submit(seed=fake_child.DEAF)
    wait_until(lambda: metrics_of(depot.events(job_id)))
    depot.cancel(job_id)
    assert ended(depot, job_id).state == "cancelled"


def test_drain_gives_jobs_back_and_claims_no_more(depot: Depot, runner: Runner) -> None:
    job_id = depot.submit(seed=fake_child.LONG)
    wait_until(lambda: metrics_of(depot.events(job_id)))
    runner.drain()
    assert runner.join(120)
    job = depot.job(job_id)
    assert (job.state, job.attempt, job.infra_failures) == ("queued", 1, 0)


def test_a_lost_fence_kills_the_child_and_publishes_nothing(depot: Depot, runner: Runner, host: Host) -> None:
    job_id = depot.submit(seed=fake_child.DEAF)
    wait_until(lambda: metrics_of(depot.events(job_id)))
    with transaction(depot.sessions) as session:
        job = session.get_one(Job, job_id)
        job.fence = session.scalars(select(fence_seq.next_value())).one()
        job.worker = "someone else"
    wait_until(lambda: not list(host.work.path.iterdir()), what="the attempt to be dropped")
    job = depot.job(job_id)
    assert (job.state, job.worker) == ("running", "someone else")
    assert depot.versions() == []


@pytest.mark.parametrize(
    ("mode", "state", "error_class", "code"),
    [
        (fake_child.CRASH, "queued", "bug", "trainer_crashed"),
        (fake_child.KILLED, "queued", "infra", "trainer_killed"),
        (fake_child.SEGV, "queued", "native_crash", "trainer_crashed"),
        (fake_child.REFUSE, "failed", "user", "invalid_training_file"),
        (fake_child.BROKEN, "queued", "bug", "invalid_adapter"),
        (fake_child.LINK, "queued", "bug", "invalid_output"),
    ],
)
def test_each_ending_has_its_class(
    depot: Depot, runner: Runner, mode: int, state: str, error_class: str, code: str
) -> None:
    job_id = depot.submit(seed=mode)
    job = ended(depot, job_id)
    assert (job.state, job.error_class, job.error_code) == (state, error_class, code)
    assert depot.versions() == []


def test_bytes_that_no_longer_match_are_retried_as_infra(depot: Depot, runner: Runner, tmp_path: Path) -> None:
    with depot.sessions() as session:
        blob = session.scalars(select(Blob).where(Blob.sha256 == base_file(depot).sha256)).one()
    path = tmp_path / "objects" / blob.key
    path.write_bytes(b"\0" * path.stat().st_size)
    job = ended(depot, depot.submit())
    assert (job.state, job.error_class, job.error_code) == ("queued", "infra", "artifact_corrupt")


def base_file(depot: Depot) -> Blob:
    with depot.sessions() as session:
        return next(file.blob for file in session.merge(depot.base).files if file.path == "model.safetensors")


def test_hostile_output_is_ignored(depot: Depot, runner: Runner) -> None:
    job_id = depot.submit(seed=fake_child.HOSTILE)
    assert ended(depot, job_id).state == "succeeded"
    messages = [event.message for event in depot.events(job_id)]
    assert max(len(message) for message in messages) < 4096
    assert [point["step"] for point in metrics_of(depot.events(job_id))] == [1, 3]


def test_what_a_child_started_ends_with_it(depot: Depot, runner: Runner) -> None:
    job_id = depot.submit(seed=fake_child.BREED)
    assert ended(depot, job_id).state == "succeeded"
    (told,) = [event.message for event in depot.events(job_id) if event.message.startswith("started ")]
    wait_until(lambda: not is_alive(int(told.split()[1])))


def test_an_outage_of_the_store_is_waited_out(depot: Depot, host: Host, tmp_path: Path) -> None:
    objects, away = tmp_path / "objects", tmp_path / "away"
    job_id = depot.submit()
    objects.rename(away)
    runner = Runner(host, queues=["default"], slots=1, poll_seconds=0.1)
    runner.start()
    wait_until(lambda: depot.job(job_id).state == "running")
    away.rename(objects)
    assert ended(depot, job_id).state == "succeeded"
    runner.drain()
    assert runner.join(120)


class Swallowing:
    """A store that never answers the first call about a file of this name."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._name = name
        self.asked = threading.Event()
        self.given_up = threading.Event()
        self.over = threading.Event()

    def fetch(self, key: str, path: Path, **facts: Any) -> None:
        self._swallow(path)
        self._store.fetch(key, path, **facts)

    def put(self, key: str, path: Path, **facts: Any) -> None:
        self._swallow(path)
        self._store.put(key, path, **facts)

    def _swallow(self, path: Path) -> None:
        if path.name == self._name and not self.asked.is_set():
            self.asked.set()
            self.given_up.wait()
            self.over.set()
            raise StorageUnavailable("It timed out.")


@pytest.fixture(params=["model.safetensors", "train.jsonl", "adapter_model.safetensors"])
def swallowing(depot: Depot, request: pytest.FixtureRequest) -> Iterator[Swallowing]:
    store = Swallowing(depot.store, request.param)
    yield store
    store.given_up.set()
    assert store.over.wait(60)


@pytest.fixture
def swallowed(host: Host, swallowing: Swallowing, tmp_path: Path) -> Runner:
    store: Any = swallowing
    host = replace(host, store=store, cache=BaseCache(tmp_path / "cold", store))
    runner = Runner(host, queues=["default"], slots=1, poll_seconds=0.1)
    runner.start()
    return runner


def test_cancel_frees_a_slot_whose_store_never_answers(depot: Depot, swallowed: Runner, swallowing: Swallowing) -> None:
    job_id = depot.submit()
    wait_until(swallowing.asked.is_set)
    depot.cancel(job_id)
    assert ended(depot, job_id).state == "cancelled"
    assert ended(depot, depot.submit(adapter="other")).state == "succeeded"
    swallowed.drain()
    assert swallowed.join(60)


def test_drain_gives_a_job_back_whose_store_never_answers(
    depot: Depot, swallowed: Runner, swallowing: Swallowing
) -> None:
    job_id = depot.submit()
    wait_until(swallowing.asked.is_set)
    swallowed.drain()
    assert swallowed.join(60)
    job = depot.job(job_id)
    assert (job.state, job.attempt, job.infra_failures) == ("queued", 1, 0)


def test_a_wake_up_ends_an_idle_wait(depot: Depot, host: Host) -> None:
    runner = Runner(host, queues=["default"], slots=1, poll_seconds=3600)
    runner.start()
    job_id = depot.submit()
    # Woken for ever, because the first hint may come before the slot has begun to wait.
    stop = threading.Event()
    waker = threading.Thread(target=lambda: [runner.wake() for _ in iter(lambda: stop.wait(0.1), True)])
    waker.start()
    assert ended(depot, job_id).state == "succeeded"
    stop.set()
    waker.join()
    runner.drain()
    assert runner.join(120)


def test_the_published_bytes_are_the_childs(depot: Depot, runner: Runner, adapter_dir: Path, tmp_path: Path) -> None:
    ended(depot, depot.submit())
    with depot.sessions() as session:
        for row in session.scalars(select(VersionFile)):
            depot.store.fetch(row.blob.key, tmp_path / row.path, sha256=row.blob.sha256, size=row.blob.size)
            assert (tmp_path / row.path).read_bytes() == (adapter_dir / row.path).read_bytes()
