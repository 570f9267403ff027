"""Repeating a submit, reading, listing, following and cancelling jobs."""

import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from registry.db import SessionFactory, transaction
from registry.jobs.events import NewEvent
from registry.jobs.fail import fail
from registry.jobs.lease import claim, heartbeat
from registry.jobs.publish import publish_version
from registry.models import Job
from tests.api.conftest import refused
from tests.factories import make_blob

Submit = Callable[..., Any]


def run_next(sessions: SessionFactory) -> Job:
    with transaction(sessions) as session:
        job = claim(session, queues=["default"], worker="w", lease_seconds=60)
    assert job is not None
    return job


class TestIdempotency:
    def test_same_key_same_body_is_one_job(self, submit: Submit) -> None:
        first, second = (submit(headers={"Idempotency-Key": "k1"}) for _ in range(2))
        assert first.json()["id"] == second.json()["id"]
        assert "idempotency-replayed" not in first.headers
        assert second.headers["idempotency-replayed"] == "true"

    def test_same_key_other_body_is_refused(self, submit: Submit) -> None:
        submit(headers={"Idempotency-Key": "k1"})
        refused(submit(headers={"Idempotency-Key": "k1"}, suffix="x"), 422, "idempotency_key_reused")

    @pytest.mark.parametrize("name", ["", "a b", "x" * 300])
    def test_malformed_key(self, submit: Submit, name: str) -> None:
        refused(submit(headers={"Idempotency-Key": name}), 400, "invalid_idempotency_key")

    def test_the_stock_clients_retry_is_one_job(self, submit: Submit) -> None:
        first = submit(headers={"x-stainless-retry-count": "0"}, seed=1)
        again = submit(headers={"x-stainless-retry-count": "1"}, seed=1)
        assert first.json()["id"] == again.json()["id"]
        assert again.headers["idempotency-replayed"] == "true"

    def test_two_first_sends_are_two_jobs(self, submit: Submit) -> None:
        first, second = (submit(headers={"x-stainless-retry-count": "0"}, seed=1) for _ in range(2))
        assert first.json()["id"] != second.json()["id"]

    def test_parallel_sends_make_one_job(self, submit: Submit) -> None:
        ids: list[str] = []
        threads = [
            threading.Thread(target=lambda: ids.append(submit(headers={"Idempotency-Key": "p"}).json()["id"]))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ids) == 6
        assert len(set(ids)) == 1


class TestRead:
    def test_a_published_job_names_its_version(
        self, client: TestClient, submit: Submit, sessions: SessionFactory
    ) -> None:
        job_id = submit().json()["id"]
        job = run_next(sessions)
        running = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        assert (running["status"], running["attempt"]) == ("running", 1)
        assert running["started_at"] is not None
        with transaction(sessions) as session:
            blob = make_blob(session)
            publish_version(
                session,
                job_id=job.id,
                fence=job.fence or 0,
                files={"adapter_config.json": blob.id},
                manifest={"files": []},
                metrics=None,
                trained_tokens=99,
            )
        done = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        assert (done["status"], done["fine_tuned_model"], done["version"]) == ("succeeded", "support-bot@1", 1)
        assert done["trained_tokens"] == 99
        assert done["finished_at"] >= done["created_at"]

    def test_a_failed_job_says_why(self, client: TestClient, submit: Submit, sessions: SessionFactory) -> None:
        job_id = submit().json()["id"]
        job = run_next(sessions)
        with transaction(sessions) as session:
            fail(
                session,
                job_id=job.id,
                fence=job.fence or 0,
                error_class="user",
                code="no_trainable_tokens",
                message="All rows are too long.",
                max_infra_failures=3,
            )
        body = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        assert body["status"] == "failed"
        assert body["error"] == {"code": "no_trainable_tokens", "message": "All rows are too long.", "param": None} | {
            "suggested_patch": None  # the base reads no more than the job already allows
        }

    def test_pages_visit_every_job_once(self, client: TestClient, submit: Submit) -> None:
        made = [submit(suffix=f"s{n}").json()["id"] for n in range(3)]
        first = client.get("/v1/fine_tuning/jobs", params={"limit": 2}).json()
        second = client.get("/v1/fine_tuning/jobs", params={"limit": 2, "after": first["last_id"]}).json()
        assert [j["id"] for j in first["data"] + second["data"]] == made[::-1]
        assert (first["has_more"], second["has_more"]) == (True, False)

    def test_metadata_filters(self, client: TestClient, submit: Submit) -> None:
        wanted = submit(metadata={"team": "a", "n": "1"}).json()["id"]
        submit(metadata={"team": "b"}, suffix="two")
        found = client.get("/v1/fine_tuning/jobs", params={"metadata[team]": "a"}).json()["data"]
        assert [j["id"] for j in found] == [wanted]
        both = client.get("/v1/fine_tuning/jobs", params={"metadata[team]": "a", "metadata[n]": "2"}).json()
        assert both["data"] == []

    @pytest.mark.parametrize("after", ["x", f"ftjob-{uuid.UUID(int=7).hex}", "ftjob-" + "z" * 32])
    def test_foreign_cursor(self, client: TestClient, after: str) -> None:
        refused(client.get("/v1/fine_tuning/jobs", params={"after": after}), 400, "invalid_cursor")


class TestEvents:
    def test_newest_first_in_pages(self, client: TestClient, submit: Submit, sessions: SessionFactory) -> None:
        job_id = submit().json()["id"]
        job = run_next(sessions)
        told = [NewEvent("metrics", "info", f"step {n}", {"step": n, "train_loss": 1.5}) for n in range(3)]
        with transaction(sessions) as session:
            heartbeat(
                session,
                job_id=job.id,
                fence=job.fence or 0,
                lease_seconds=60,
                progress={"step": 3},
                events=told,
            )
        address = f"/v1/fine_tuning/jobs/{job_id}/events"
        page = client.get(address, params={"limit": 2}).json()
        assert [e["message"] for e in page["data"]] == ["step 2", "step 1"]
        assert page["data"][0]["data"] == {"step": 2, "train_loss": 1.5}
        assert page["data"][0]["object"] == "fine_tuning.job.event"
        rest = client.get(address, params={"after": page["last_id"], "limit": 100}).json()
        assert rest["data"][0]["message"] == "step 0"
        assert rest["has_more"] is False
        assert client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["progress"] == {"step": 3}

    @pytest.mark.parametrize("after", ["1", "ftevent-", "ftevent-999999", "ftevent-" + "9" * 30, "ftevent-x"])
    def test_foreign_cursor(self, client: TestClient, submit: Submit, after: str) -> None:
        address = f"/v1/fine_tuning/jobs/{submit().json()['id']}/events"
        refused(client.get(address, params={"after": after}), 400, "invalid_cursor")


class TestAttempts:
    def test_an_attempt_tells_how_it_ended(self, client: TestClient, submit: Submit, sessions: SessionFactory) -> None:
        job_id = submit().json()["id"]
        address = f"/v1/fine_tuning/jobs/{job_id}/attempts"
        assert client.get(address).json()["data"] == []
        job = run_next(sessions)
        with transaction(sessions) as session:
            told = {"error_class": "infra", "code": "disk_full", "message": "The disk is full."}
            fail(session, job_id=job.id, fence=job.fence or 0, max_infra_failures=3, **told)
        (attempt,) = client.get(address).json()["data"]
        assert (attempt["id"], attempt["worker"], attempt["ending"]) == ("attempt-1", "w", "failed")
        assert attempt["error"] == {"class": "infra", "code": "disk_full", "message": "The disk is full."}
        assert client.get(address, params={"after": "attempt-1"}).json()["data"] == []

    @pytest.mark.parametrize("after", ["1", "attempt-", "attempt-7", "attempt-" + "9" * 30])
    def test_foreign_cursor(self, client: TestClient, submit: Submit, after: str) -> None:
        address = f"/v1/fine_tuning/jobs/{submit().json()['id']}/attempts"
        refused(client.get(address, params={"after": after}), 400, "invalid_cursor")


class TestPause:
    def test_a_paused_job_is_queued_for_openai_and_paused_for_us(
        self, client: TestClient, submit: Submit, sessions: SessionFactory
    ) -> None:
        address = f"/v1/fine_tuning/jobs/{submit().json()['id']}"
        body = client.post(f"{address}/pause").json()
        assert (body["status"], body["state"]) == ("queued", "paused")
        body = client.post(f"{address}/resume").json()
        assert (body["status"], body["state"]) == ("queued", "queued")
        run_next(sessions)
        body = client.post(f"{address}/pause").json()
        assert (body["status"], body["state"]) == ("running", "pausing")

    @pytest.mark.parametrize("verb", ["pause", "resume"])
    def test_what_ends_or_has_ended_is_refused(
        self, client: TestClient, submit: Submit, sessions: SessionFactory, verb: str
    ) -> None:
        address = f"/v1/fine_tuning/jobs/{submit().json()['id']}"
        run_next(sessions)
        client.post(f"{address}/cancel")
        refused(client.post(f"{address}/{verb}"), 409, "job_cancelling")
        ended = f"/v1/fine_tuning/jobs/{submit(suffix='x').json()['id']}"
        client.post(f"{ended}/cancel")
        refused(client.post(f"{ended}/{verb}"), 409, "job_terminal")


class TestPlacement:
    def test_a_job_shows_how_it_waits(self, client: TestClient, submit: Submit) -> None:
        body = submit(depot={"priority": 3, "deadline_seconds": 3600}).json()
        assert (body["depot"]["priority"], body["depot"]["queue"]) == (3, "default")
        assert body["depot"]["deadline_at"] - body["created_at"] in range(3600, 3660)

    @pytest.mark.parametrize(
        ("depot", "code"),
        [
            ({"priority": 10**9}, "invalid_value"),
            ({"priority": -1}, "invalid_value"),
            ({"queue": "../internal"}, "invalid_value"),
            ({"queue": "gpu"}, "unknown_queue"),
            ({"deadline_seconds": 1}, "invalid_value"),
            ({"image": "x"}, "unknown_field"),
        ],
    )
    def test_what_cannot_be_is_refused(self, submit: Submit, depot: dict[str, Any], code: str) -> None:
        error = refused(submit(depot=depot), 422, code)
        assert error["param"].startswith("depot.")


class TestQueue:
    def test_a_waiting_job_says_why(self, client: TestClient, submit: Submit, sessions: SessionFactory) -> None:
        address = f"/v1/fine_tuning/jobs/{submit().json()['id']}"
        body = client.get(f"{address}/queue").json()
        assert (body["position"], body["reason"], body["estimate_seconds"]) == (1, "no_worker", None)
        client.post(f"{address}/pause")
        assert client.get(f"{address}/queue").json()["state"] == "paused"
        client.post(f"{address}/resume")
        run_next(sessions)
        body = client.get(f"{address}/queue").json()
        assert (body["state"], body["position"], body["reason"]) == ("running", None, None)


class TestCancel:
    def test_a_queued_job_ends_at_once(self, client: TestClient, submit: Submit) -> None:
        job_id = submit().json()["id"]
        body = client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()
        assert (body["status"], body["state"]) == ("cancelled", "cancelled")
        again = client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        assert (again.status_code, again.json()["state"]) == (200, "cancelled")

    def test_a_running_job_is_shown_as_running_until_its_worker_lets_go(
        self, client: TestClient, submit: Submit, sessions: SessionFactory
    ) -> None:
        job_id = submit().json()["id"]
        run_next(sessions)
        body = client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()
        assert (body["status"], body["state"]) == ("running", "cancelling")

    def test_an_ended_job_conflicts_and_need_not_be_asked_again(
        self, client: TestClient, submit: Submit, sessions: SessionFactory
    ) -> None:
        job_id = submit().json()["id"]
        run_next(sessions)
        with transaction(sessions) as session:
            session.execute(
                text("UPDATE jobs SET state = 'failed', lease_expires_at = NULL, finished_at = clock_timestamp()")
            )
        response = client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        refused(response, 409, "job_terminal")
        assert response.headers["x-should-retry"] == "false"
