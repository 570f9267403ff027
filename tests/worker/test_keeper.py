"""What the supervisor does with checkpoints of a child that may be broken, on a store that may be away."""

import hashlib
import math
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from sqlalchemy import select

from lora_core.checkpoint import DOCUMENT_FILE, TENSORS_FILE, Fingerprint
from lora_core.state import TrainState, save_checkpoint
from registry.db import transaction
from registry.errors import CheckpointNotPublishable
from registry.jobs.checkpoints import newest_checkpoints
from registry.jobs.inputs import train_inputs
from registry.jobs.lease import claim
from registry.jobs.promote import promote_checkpoint
from registry.models import Checkpoint, Job, JobAttempt, fence_seq
from tests.worker.depot import Depot, wait_until
from worker.attempt import Attempt, Stop
from worker.host import Host
from worker.inputs import fetch_checkpoint
from worker.keeper import STORE_SECONDS, CheckpointKeeper, keep_checkpoints
from worker.merge_recipe import RECIPE_FILE, read_recipe
from worker.protocol import CheckpointMessage, ResumedMessage
from worker.publish import describe_adapter
from worker.recipe_child import write_recipe


@pytest.fixture
def job(depot: Depot) -> Job:
    depot.submit()
    with transaction(depot.sessions) as session:
        job = claim(session, queues=["default"], worker="w", lease_seconds=600)
    assert job is not None
    return job


@pytest.fixture
def attempt(job: Job) -> Attempt:
    assert job.fence is not None
    return Attempt(job_id=job.id, tenant_id=job.tenant_id, fence=job.fence)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


@pytest.fixture
def keeper(host: Host, attempt: Attempt, folder: Path) -> Iterator[CheckpointKeeper]:
    keeper = CheckpointKeeper(host, attempt, folder, lambda *_: None)
    yield keeper
    attempt.stop(Stop.LOST)  # leaves at once
    keeper.close()
    keeper._thread.join(60)


def save(folder: Path, step: int, *, says: int | None = None) -> CheckpointMessage:
    state = TrainState(says or step, 100, 0.5, None, {"rng.cpu": torch.zeros(8, dtype=torch.uint8)})
    save_checkpoint(folder / str(step), state, Fingerprint({}, {}))
    return CheckpointMessage(step=step, metrics={"train_loss": 0.5})


def steps(depot: Depot, job_id: uuid.UUID) -> list[int]:
    with depot.sessions() as session:
        return [row.step for row in newest_checkpoints(session, job_id)]


def test_a_checkpoint_is_stored_committed_and_cleared_away(
    depot: Depot, keeper: CheckpointKeeper, attempt: Attempt, folder: Path
) -> None:
    keeper.hear(save(folder, 5))
    keeper.close()
    assert steps(depot, attempt.job_id) == [5]
    assert list(folder.iterdir()) == []
    progress, *_ = attempt.news.take()
    assert progress == {"checkpoint_step": 5}
    with depot.sessions() as session:
        row = session.scalars(select(Checkpoint)).one()
        assert row.metrics == {"train_loss": 0.5}
        assert [file["path"] for file in row.manifest["files"]] == [DOCUMENT_FILE, TENSORS_FILE]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_adapter_of_a_checkpoint_is_published_with_its_merge_recipe(
    depot: Depot, host: Host, attempt: Attempt, job: Job, folder: Path, base_dir: Path, adapter_dir: Path, damaged: bool
) -> None:
    message = save(folder, 5)
    shutil.copytree(adapter_dir, folder / "5", dirs_exist_ok=True)
    assert write_recipe(base_dir, folder / "5")
    recipe = read_recipe(folder / "5")
    assert recipe is not None
    if damaged:
        (folder / "5" / RECIPE_FILE).write_text("{}")
    with transaction(depot.sessions) as session:
        inputs = train_inputs(session, job)
    with keep_checkpoints(host, attempt, folder, partial(describe_adapter, inputs)) as keeper:
        keeper.hear(message)
    with transaction(depot.sessions) as session:
        (saved,) = newest_checkpoints(session, job.id)
        wanted = {"tenant_id": job.tenant_id, "job_id": job.id, "checkpoint_id": saved.id}
        if damaged:
            with pytest.raises(CheckpointNotPublishable):
                promote_checkpoint(session, **wanted)
            return
        version = promote_checkpoint(session, **wanted).version
        assert version.merge_recipe == recipe
        assert version.manifest["merge_recipe"] == {"sha256": hashlib.sha256(recipe.encode()).hexdigest()}


def missing(folder: Path) -> CheckpointMessage:
    return CheckpointMessage(step=5)


def half(folder: Path) -> CheckpointMessage:
    message = save(folder, 5)
    (folder / "5" / TENSORS_FILE).unlink()
    return message


def link(folder: Path) -> CheckpointMessage:
    message = half(folder)
    (folder / "5" / TENSORS_FILE).symlink_to("/etc/passwd")
    return message


def of_another_step(folder: Path) -> CheckpointMessage:
    return save(folder, 5, says=6)


def of_other_bytes(folder: Path) -> CheckpointMessage:
    message = save(folder, 5)
    with (folder / "5" / TENSORS_FILE).open("ab") as file:
        file.write(b"\0")
    return message


@pytest.mark.parametrize("lie", [missing, half, link, of_another_step, of_other_bytes])
def test_what_is_no_checkpoint_is_dropped_and_the_next_is_kept(
    depot: Depot, keeper: CheckpointKeeper, attempt: Attempt, folder: Path, lie: Callable[[Path], CheckpointMessage]
) -> None:
    keeper.hear(lie(folder))
    wait_until(lambda: not (folder / "5").exists())
    keeper.hear(save(folder, 7))
    keeper.close()
    assert steps(depot, attempt.job_id) == [7]
    assert attempt.reason is None


def test_after_an_outage_only_the_newest_is_stored(
    depot: Depot, keeper: CheckpointKeeper, attempt: Attempt, folder: Path, tmp_path: Path
) -> None:
    objects, away = tmp_path / "objects", tmp_path / "away"
    objects.rename(away)
    for step in (1, 2, 3):
        keeper.hear(save(folder, step))
    wait_until(lambda: sorted(path.name for path in folder.iterdir()) == ["3"], what="older ones to be cleared away")
    away.rename(objects)
    wait_until(lambda: steps(depot, attempt.job_id) == [3])


def test_an_outage_does_not_hold_up_a_cancelled_job(
    depot: Depot, host: Host, keeper: CheckpointKeeper, attempt: Attempt, folder: Path, tmp_path: Path
) -> None:
    objects, away = tmp_path / "objects", tmp_path / "away"
    objects.rename(away)
    keeper.hear(save(folder, 1))
    attempt.stop(Stop.CANCEL)
    keeper.close()
    wait_until(lambda: not keeper._thread.is_alive())
    away.rename(objects)
    assert steps(depot, attempt.job_id) == []


def test_a_cancel_ends_the_wait_for_a_store_that_is_away(
    depot: Depot, keeper: CheckpointKeeper, attempt: Attempt, folder: Path, tmp_path: Path
) -> None:
    objects, away = tmp_path / "objects", tmp_path / "away"
    objects.rename(away)
    keeper.hear(save(folder, 1))
    closer = threading.Thread(target=keeper.close)
    closer.start()
    wait_until(lambda: keeper._closing)
    attempt.stop(Stop.CANCEL)
    wait_until(lambda: not closer.is_alive(), seconds=30, what="the end, before what it may take without a cancel")
    away.rename(objects)


def test_a_checkpoint_of_a_detached_job_waits_for_postgres(
    depot: Depot, keeper: CheckpointKeeper, attempt: Attempt, folder: Path, tmp_path: Path
) -> None:
    assert STORE_SECONDS[Stop.DETACHED] == math.inf
    objects, away = tmp_path / "objects", tmp_path / "away"
    objects.rename(away)
    keeper.hear(save(folder, 1))
    attempt.stop(Stop.DETACHED)
    closer = threading.Thread(target=keeper.close)
    closer.start()
    wait_until(lambda: keeper._closing)
    away.rename(objects)
    wait_until(lambda: not closer.is_alive())
    assert steps(depot, attempt.job_id) == [1]


def test_a_lost_fence_stops_the_attempt(depot: Depot, keeper: CheckpointKeeper, attempt: Attempt, folder: Path) -> None:
    with transaction(depot.sessions) as session:
        session.get_one(Job, attempt.job_id).fence = session.scalars(select(fence_seq.next_value())).one()
    keeper.hear(save(folder, 5))
    wait_until(lambda: attempt.reason is Stop.LOST)
    assert steps(depot, attempt.job_id) == []


@pytest.mark.parametrize(("differences", "resume"), [([], "exact"), (["torch 2 → 3"], "best_effort")])
def test_how_exact_a_resume_is_goes_on_record(
    depot: Depot, keeper: CheckpointKeeper, attempt: Attempt, differences: list[str], resume: str
) -> None:
    keeper.hear(ResumedMessage(step=5, differences=differences))
    keeper.close()
    with depot.sessions() as session:
        assert session.scalars(select(JobAttempt.resume)).one() == resume
    assert attempt.news.take()[0] == {"checkpoint_step": 5}


def test_when_all_checkpoints_are_gone_the_job_starts_over(
    depot: Depot, host: Host, keeper: CheckpointKeeper, attempt: Attempt, job: Job, folder: Path, tmp_path: Path
) -> None:
    for step in (5, 6):
        keeper.hear(save(folder, step))
        wait_until(lambda step=step: step in steps(depot, job.id))
    with depot.sessions() as session:
        for row in newest_checkpoints(session, job.id):
            depot.store.delete(row.files[0].blob.key)
    assert fetch_checkpoint(host, attempt, job, tmp_path / "resume") is None
    assert steps(depot, job.id) == []
    assert list((tmp_path / "resume").iterdir()) == []
