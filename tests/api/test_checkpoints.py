"""A job's checkpoints, in the shape OpenAI's clients know."""

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from httpx import Response
from openai import OpenAI
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from registry.db import SessionFactory, transaction
from registry.ids import parse_id, public_id
from registry.jobs.checkpoints import commit_checkpoint
from registry.jobs.lease import claim
from tests.api.conftest import bearer, refused
from tests.factories import make_blob

Submit = Callable[..., Any]


def made_of(session: Session, *, usable: bool) -> dict[str, Any]:
    """Files and manifest of a checkpoint; if it is `usable`, with an adapter."""
    adapter = make_blob(session)
    state = {"path": "checkpoint.json", "size": 3, "sha256": "0" * 64}
    weights = {"path": "adapter_model.safetensors", "size": adapter.size, "sha256": adapter.sha256}
    return {
        "files": {"checkpoint.json": make_blob(session).id, weights["path"]: adapter.id},
        "manifest": {"files": [state], "adapter": {"files": [weights]} if usable else None},
    }


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
                **made_of(session, usable=step > 20),
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


def publish(client: TestClient, job_id: str, number: int = 0, **options: Any) -> Response:
    """Of the checkpoint at this place of the list."""
    address = f"/v1/fine_tuning/jobs/{job_id}/checkpoints"
    checkpoint = client.get(address).json()["data"][number]["id"]
    return client.post(f"{address}/{checkpoint}/publish", **options)


def test_a_checkpoint_is_published_once(client: TestClient, saved: str) -> None:
    version = publish(client, saved).json()
    assert (version["object"], version["ref"], version["job_id"]) == ("adapter.version", "support-bot@1", saved)
    first = client.get(f"/v1/fine_tuning/jobs/{saved}/checkpoints").json()["data"][0]
    assert (first["id"], first["version"]) == (version["checkpoint"], 1)
    assert first["fine_tuned_model_checkpoint"] == "support-bot@1"
    assert first["files"] == version["files"]
    assert publish(client, saved).json() == version
    assert client.get("/v1/adapters/support-bot/versions/1").json() == version
    assert "support-bot@1" in {model["id"] for model in client.get("/v1/models").json()["data"]}


def test_the_adapter_of_a_checkpoint_is_downloaded_like_any_file(client: TestClient, saved: str) -> None:
    address = f"/v1/fine_tuning/jobs/{saved}/checkpoints"
    first = client.get(address).json()["data"][0]
    (file,) = first["files"]
    answer = client.get(f"{address}/{first['id']}/files/{file['path']}", follow_redirects=False)
    assert (answer.status_code, answer.headers["x-depot-sha256"]) == (302, file["sha256"])
    refused(client.get(f"{address}/{first['id']}/files/checkpoint.json"), 404, "artifact_not_found")


def test_what_cannot_be_published_says_why(client: TestClient, saved: str, other_key: str) -> None:
    refused(publish(client, saved, 1), 409, "checkpoint_not_publishable")
    address = f"/v1/fine_tuning/jobs/{saved}/checkpoints"
    for strange in ("x", saved, public_id("ftckpt", uuid.uuid4())):
        refused(client.post(f"{address}/{strange}/publish"), 404, "checkpoint_not_found")
    refused(publish(client, saved, headers=bearer(other_key)), 404, "job_not_found")


def test_pages_meet(client: TestClient, saved: str) -> None:
    address = f"/v1/fine_tuning/jobs/{saved}/checkpoints"
    first = client.get(address, params={"limit": 1}).json()
    second = client.get(address, params={"limit": 1, "after": first["last_id"]}).json()
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert [page["data"][0]["step_number"] for page in (first, second)] == [30, 20]


@pytest.mark.parametrize("after", ["x", "ftjob-" + "0" * 32, public_id("ftckpt", uuid.UUID(int=7))])
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
