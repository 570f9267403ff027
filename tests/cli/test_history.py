"""The commands that look back at a job, tell others when it ends, and compare the books with the shelves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from registry.db import transaction
from registry.jobs.checkpoints import commit_checkpoint
from registry.jobs.events import NewEvent
from registry.jobs.fail import fail
from tests.cli.conftest import SECRET, Run
from tests.cli.live import Depot, _uuid
from tests.cli.test_client import submit
from tests.factories import make_blob


@pytest.fixture
def failed(depot: Depot, run: Run, rows: str) -> str:
    """A job that trained, saved checkpoints at steps 10 and 20, and diverged."""
    job_id = submit(run, rows, "--adapter", "bot")
    fence = depot.claim(job_id)
    points = [{"step": step, "train_loss": 2.0 / step, "total_steps": 40} for step in range(1, 21)]
    depot.tell(job_id, fence, *(NewEvent("metrics", "info", f"Loss at step {p['step']}", p) for p in points))
    depot.tell(job_id, fence, NewEvent("message", "warn", "It wobbles [here]."))
    for step in (10, 20):
        save(depot, job_id, fence, step)
    with transaction(depot.sessions) as session:
        told = {"error_class": "diverged", "code": "training_diverged", "message": "The loss is NaN."}
        fail(session, job_id=_uuid(job_id), fence=fence, max_infra_failures=0, **told)
    return job_id


def save(depot: Depot, job_id: str, fence: int, step: int) -> None:
    with transaction(depot.sessions) as session:
        weights = make_blob(session)
        listed = [{"path": "adapter_model.safetensors", "size": weights.size, "sha256": weights.sha256}]
        commit_checkpoint(
            session,
            job_id=_uuid(job_id),
            fence=fence,
            step=step,
            files={"adapter_model.safetensors": weights.id},
            manifest={"files": listed, "adapter": {"files": listed, "step": step}},
            metrics={"train_loss": 0.125},
        )


def test_logs_are_printed_in_order(run: Run, failed: str) -> None:
    said = run("jobs", "logs", failed).output
    assert said.index("The job is queued.") < said.index("warn: It wobbles [here].") < said.index("The loss is NaN.")
    assert "Loss at step" not in said
    assert "Loss at step 7" in run("jobs", "logs", failed, "--metrics").output
    assert json.loads(run("jobs", "logs", failed, "--json").output)[0]["message"] == "The job is queued."


def test_attempts_say_how_they_ended(run: Run, failed: str) -> None:
    said = run("jobs", "attempts", failed).output
    assert "failed" in said and "The loss is NaN. (training_diverged)" in said


def test_a_curve_is_drawn(run: Run, failed: str) -> None:
    said = run("jobs", "curve", failed).output
    assert "training loss" in said and "2.000 ┤" in said
    assert "validation" not in said


def test_a_job_without_steps_has_no_curve(run: Run, rows: str) -> None:
    assert "No step" in run("jobs", "curve", submit(run, rows)).output


@pytest.mark.parametrize(("which", "step"), [((), 20), (("latest",), 20), (("10",), 10)])
def test_a_lost_run_is_saved_by_its_checkpoint(run: Run, failed: str, which: tuple[str, ...], step: int) -> None:
    assert "bot:ckpt-step-20" in run("jobs", "checkpoints", failed).output
    assert "Published bot@1" in run("jobs", "publish", failed, *which).output
    rows = json.loads(run("jobs", "checkpoints", failed, "--json").output)
    assert {row["step_number"]: row["version"] for row in rows} == {20: None, 10: None} | {step: 1}


def test_a_checkpoint_that_is_not_there_is_a_sentence(run: Run, failed: str) -> None:
    assert "(checkpoint_not_found)" in run("jobs", "publish", failed, "30", status=1).stderr


def test_webhooks_come_and_go(run: Run) -> None:
    said = run("webhooks", "add", "https://example.com/hook", "--name", "ci").output
    assert "whsec_" in said
    (row,) = json.loads(run("webhooks", "list", "--json").output)
    types = [kind["event_type"] for kind in json.loads(run("webhooks", "types", "--json").output)]
    assert row["event_types"] == sorted(types) and "fine_tuning.job.failed" in types
    assert "ci" in run("webhooks", "list").output
    run("webhooks", "delete", row["id"])
    assert "No webhook yet" in run("webhooks", "list").output


def test_a_webhook_that_cannot_be_reached_is_a_sentence(run: Run) -> None:
    run("webhooks", "add", "https://192.0.2.1/hook", status=1)
    run("webhooks", "add", "https://nobody.invalid/hook")
    (row,) = json.loads(run("webhooks", "list", "--json").output)
    assert "(webhook_" in run("webhooks", "test", row["id"], status=1).stderr


def test_verify_ends_with_1_when_anything_differs(
    depot: Depot, run: Run, rows: str, database_url: str, tmp_path: Path
) -> None:
    settings = {
        "DEPOT_DATABASE_URL": database_url,
        "DEPOT_STORE_URL": f"file://{tmp_path}/objects",
        "DEPOT_SECRET_KEY": SECRET,
    }
    run("files", "upload", rows)
    assert verify(settings) == 0
    (stored,) = [path for path in (tmp_path / "objects" / "blobs").rglob("*") if path.is_file()]
    stored.unlink()
    assert verify(settings) == 1


def verify(settings: dict[str, str]) -> int:
    argv = [sys.executable, "-m", "cli.main", "verify"]
    return subprocess.run(argv, env={**os.environ, **settings}, check=False).returncode


def test_verify_without_a_depot_is_a_sentence(run: Run, tmp_path: Path) -> None:
    said = run("verify", "--home", str(tmp_path / "nowhere"), status=1).stderr
    assert "(not_running)" in said
    assert not (tmp_path / "nowhere").exists()
