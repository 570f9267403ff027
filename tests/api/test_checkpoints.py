"""A job's checkpoints, in the shape OpenAI's clients know."""

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from registry.db import SessionFactory, transaction
from registry.ids import parse_id, public_id
from registry.jobs.checkpoints import commit_checkpoint
from registry.jobs.lease import claim
from tests.api.conftest import bearer, refused
from tests.factories import make_blob

Submit = Callable[..., Any]


@pytest.fixture
def saved(submit: Submit, sessions: SessionFactory) -> str:
    """The id of a running job with checkpoints at steps 10, 20 and 30, of which two are kept."""
    job_id = submit().json()["id"]
    with transaction(sessions) as session:
        job = claim(session, queues=["default"], worker="w", lease_seconds=60)
        assert job is not None
        for step in (10, 20, 30):
            commit_checkpoint(
                session,
                job_id=job.id,
                fence=job.fence or 0,
                step=step,
                files={"checkpoint.json": make_blob(session).id},
                manifest={"files": [{"path": "checkpoint.json", "size": 3, "sha256": "0" * 64}]},
                metrics={"train_loss": 1 / step},
            )
    return job_id


def test_the_newest_comes_first(client: TestClient, saved: str) -> None:
    body = client.get(f"/v1/fine_tuning/jobs/{saved}/checkpoints").json()
    assert [row["step_number"] for row in body["data"]] == [30, 20]
    first = body["data"][0]
    assert parse_id("ftckpt", first["id"])
    assert first["object"] == "fine_tuning.job.checkpoint"
    assert first["fine_tuned_model_checkpoint"] == "support-bot:ckpt-step-30"
    assert first["fine_tuning_job_id"] == saved
    assert first["metrics"] == {"step": 30, "train_loss": 1 / 30, "valid_loss": None}
    assert first["bytes"] == 3


def test_pages_meet(client: TestClient, saved: str) -> None:
    address = f"/v1/fine_tuning/jobs/{saved}/checkpoints"
    first = client.get(address, params={"limit": 1}).json()
    second = client.get(address, params={"limit": 1, "after": first["last_id"]}).json()
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert [page["data"][0]["step_number"] for page in (first, second)] == [30, 20]


@pytest.mark.parametrize("after", ["x", "ftjob-" + "0" * 32, public_id("ftckpt", uuid.uuid4())])
def test_a_foreign_cursor_is_refused(client: TestClient, saved: str, after: str) -> None:
    refused(client.get(f"/v1/fine_tuning/jobs/{saved}/checkpoints", params={"after": after}), 400, "invalid_cursor")


def test_a_job_without_any_has_an_empty_list(client: TestClient, submit: Submit) -> None:
    body = client.get(f"/v1/fine_tuning/jobs/{submit().json()['id']}/checkpoints").json()
    assert (body["data"], body["has_more"]) == ([], False)


def test_another_tenants_job_has_no_list(client: TestClient, saved: str, other_key: str) -> None:
    address = f"/v1/fine_tuning/jobs/{saved}/checkpoints"
    refused(client.get(address, headers=bearer(other_key)), 404, "job_not_found")


def test_openais_client_pages_through_them(server: str, key: str, saved: str) -> None:
    with OpenAI(base_url=f"{server}/v1", api_key=key) as ai:
        found = list(ai.fine_tuning.jobs.checkpoints.list(saved, limit=1))
    assert [(row.step_number, row.metrics.step) for row in found] == [(30, 30), (20, 20)]
