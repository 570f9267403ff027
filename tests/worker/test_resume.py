"""Jobs that are interrupted and go on elsewhere: the adapter has the bytes of a run that nothing disturbed."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

from lora_core.checkpoint import TENSORS_FILE
from registry.jobs.checkpoints import newest_checkpoints
from registry.jobs.spec import TrainSpec
from registry.models import Checkpoint, Job, JobAttempt, JobEvent, VersionFile
from tests.tiny import make_rows, write_jsonl
from tests.worker.conftest import StartWorker
from tests.worker.depot import BASE_NAME, LORA, Depot, WorkerProcess, is_alive, wait_until
from tests.worker.held_child import HELD
from worker.reporter import Reporter
from worker.service import cpu_count
from worker.task import OUT, TrainTask
from worker.train_child import train_adapter

APP, HELD_APP = "worker.app", "tests.worker.held_app"
SPEC: dict[str, Any] = {
    "lora": {**LORA, "lora_dropout": 0.2},
    "n_epochs": 100,
    "batch_size": 8,
    "max_length": 128,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
}
EVERY_STEP, NEVER = 0.001, 3600.0


@pytest.fixture(scope="session")
def undisturbed(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the adapter that SPEC makes when nothing happens."""
    home = tmp_path_factory.mktemp("undisturbed")
    task = TrainTask(
        base_dir=base_dir,
        base_digest="0" * 64,
        base_model=BASE_NAME,
        revision=None,
        training_file=write_jsonl(home / "train.jsonl", make_rows(16)),
        validation_file=None,
        spec=TrainSpec.model_validate(SPEC),
        resume_from=None,
        checkpoint_seconds=NEVER,
        threads=max(1, cpu_count() // 2),  # as a worker of two slots gives each
    )
    train_adapter(task, home, Reporter(os.open(os.devnull, os.O_WRONLY)))
    return hashlib.sha256((home / OUT / "adapter_model.safetensors").read_bytes()).hexdigest()


def saved(depot: Depot, job_id: uuid.UUID) -> list[Checkpoint]:
    with depot.sessions() as session:
        return newest_checkpoints(session, job_id)


def told(depot: Depot, job_id: uuid.UUID, code: str) -> list[JobEvent]:
    return [event for event in depot.events(job_id) if (event.data or {}).get("code") == code]


@pytest.fixture
def held(tmp_path: Path) -> None:
    """What HELD_APP trains does not come to its end."""
    (tmp_path / HELD).touch()


def killed_after_two_checkpoints(depot: Depot, worker: WorkerProcess) -> uuid.UUID:
    """A job whose worker is dead; what it saved is there."""
    job_id = depot.submit(**SPEC)
    wait_until(lambda: len(saved(depot, job_id)) == 2, seconds=120, what="two checkpoints")
    (child,) = worker.children()
    worker.kill()
    wait_until(lambda: not is_alive(child), what="the trainer to notice that its supervisor is dead")
    wait_until(lambda: not others_at_work(depot), what="Postgres to notice it, too")
    assert depot.job(job_id).state == "running"
    return job_id


def others_at_work(depot: Depot) -> int:
    """Transactions of others that are not over."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'"
    with depot.sessions() as session:
        return session.scalars(text(f"{query} AND pid <> pg_backend_pid()")).one()


def finished(depot: Depot, job_id: uuid.UUID) -> Job:
    """The job, after it came back to the queue and succeeded."""
    wait_until(lambda: depot.job(job_id).state == "queued" or depot.job(job_id).attempt == 2, what="the reaper")
    depot.skip_backoff(job_id)
    wait_until(lambda: depot.job(job_id).state == "succeeded", seconds=200)
    return depot.job(job_id)


def adapter_digest(depot: Depot) -> str:
    with depot.sessions() as session:
        query = select(VersionFile).where(VersionFile.path == "adapter_model.safetensors")
        return session.scalars(query).one().blob.sha256


def attempts(depot: Depot, job_id: uuid.UUID) -> list[tuple[str | None, str | None]]:
    with depot.sessions() as session:
        query = select(JobAttempt).where(JobAttempt.job_id == job_id).order_by(JobAttempt.attempt)
        return [(row.ending, row.resume) for row in session.scalars(query)]


@pytest.mark.usefixtures("held")
def test_a_killed_worker_costs_no_bit_of_the_adapter(depot: Depot, start_worker: StartWorker, undisturbed: str) -> None:
    job_id = killed_after_two_checkpoints(depot, start_worker(HELD_APP, checkpoint_seconds=EVERY_STEP))
    furthest = saved(depot, job_id)[0].step
    start_worker(APP)
    job = finished(depot, job_id)
    (resumed,) = told(depot, job_id, "resumed")
    assert resumed.message == f"Resumed at step {furthest} (exact)."
    assert adapter_digest(depot) == undisturbed
    assert [version.job_id for version in depot.versions()] == [job_id]
    assert attempts(depot, job_id) == [("lost", None), ("succeeded", "exact")]
    assert (job.attempt, saved(depot, job_id)) == (2, [])


@pytest.mark.usefixtures("held")
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    depot: Depot, start_worker: StartWorker, undisturbed: str, tmp_path: Path
) -> None:
    job_id = killed_after_two_checkpoints(depot, start_worker(HELD_APP, checkpoint_seconds=EVERY_STEP))
    newest, before = saved(depot, job_id)
    key = next(file.blob.key for file in newest.files if file.path == TENSORS_FILE)
    path = tmp_path / "objects" / key
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    start_worker(APP)
    finished(depot, job_id)
    assert [event.data and event.data["step"] for event in told(depot, job_id, "checkpoint_corrupt")] == [newest.step]
    assert told(depot, job_id, "resumed")[0].message == f"Resumed at step {before.step} (exact)."
    assert adapter_digest(depot) == undisturbed


@pytest.mark.usefixtures("held")
def test_a_worker_that_is_told_to_stop_saves_first(depot: Depot, start_worker: StartWorker, undisturbed: str) -> None:
    worker = start_worker(HELD_APP, checkpoint_seconds=NEVER)
    job_id = depot.submit(**SPEC)
    wait_until(lambda: (depot.job(job_id).progress or {}).get("step"), seconds=120)
    assert saved(depot, job_id) == []
    assert worker.terminate() == 0
    job = depot.job(job_id)
    assert (job.state, job.infra_failures) == ("queued", 0)
    (checkpoint,) = saved(depot, job_id)
    start_worker(APP, checkpoint_seconds=NEVER)
    finished(depot, job_id)
    assert told(depot, job_id, "resumed")[0].message == f"Resumed at step {checkpoint.step} (exact)."
    assert adapter_digest(depot) == undisturbed
    # A run that was saved once is saved at its end too, so that a lost publication costs no training.
    assert [event.data and event.data["step"] for event in told(depot, job_id, "checkpoint_saved")] == [
        checkpoint.step,
        2 * SPEC["n_epochs"],
    ]
