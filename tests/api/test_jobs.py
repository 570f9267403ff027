"""Submitting, reading, listing and cancelling fine-tuning jobs."""

import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select, text
from starlette.testclient import TestClient

from registry.db import SessionFactory, transaction
from registry.ids import parse_id
from registry.jobs.events import NewEvent
from registry.jobs.fail import fail
from registry.jobs.lease import claim, heartbeat
from registry.jobs.publish import publish_version
from registry.models import Job, Outbox, Tenant
from tests.api.conftest import BASE, bearer, refused, upload
from tests.factories import make_blob

Submit = Callable[..., Any]


def run_next(sessions: SessionFactory) -> Job:
    with transaction(sessions) as session:
        job = claim(session, queues=["default"], worker="w", lease_seconds=60)
    assert job is not None
    return job


class TestCreate:
    def test_answers_with_openais_object_and_what_the_depot_adds(self, submit: Submit, file_id: str) -> None:
        response = submit(
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
            lora={"r": 4, "target_modules": ["q_proj"], "learning_rate": 0.01},
            seed=7,
            metadata={"team": "support"},
        )
        assert response.status_code == 200
        job = response.json()
        assert job["object"] == "fine_tuning.job"
        assert (job["status"], job["state"]) == ("queued", "queued")
        assert (job["model"], job["training_file"], job["validation_file"]) == (BASE, file_id, None)
        assert job["hyperparameters"] == {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 1.0}
        assert job["method"]["supervised"]["hyperparameters"] == job["hyperparameters"]
        assert (job["seed"], job["metadata"], job["result_files"]) == (7, {"team": "support"}, [])
        assert (job["adapter"], job["version"], job["fine_tuned_model"], job["error"]) == (
            "support-bot",
            None,
            None,
            None,
        )
        lora = job["lora"]
        assert (lora["r"], lora["lora_alpha"], lora["target_modules"], lora["learning_rate"]) == (
            4,
            8,
            ["q_proj"],
            0.01,
        )

    def test_a_success_means_the_job_and_its_wake_up_are_committed(
        self, submit: Submit, sessions: SessionFactory
    ) -> None:
        job_id = parse_id("ftjob", submit().json()["id"])
        with transaction(sessions) as session:
            assert session.get_one(Job, job_id).state == "queued"
            assert session.scalars(select(Outbox.job_id)).all() == [job_id]

    def test_defaults_are_three_epochs_of_eight_rows(self, submit: Submit) -> None:
        job = submit().json()
        assert job["hyperparameters"] == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
        assert job["lora"]["learning_rate"] == 2e-4

    def test_the_multiplier_scales_the_learning_rate(self, submit: Submit) -> None:
        job = submit(hyperparameters={"learning_rate_multiplier": 3, "n_epochs": "auto"}).json()
        assert job["lora"]["learning_rate"] == pytest.approx(6e-4)
        assert job["hyperparameters"]["learning_rate_multiplier"] == 3

    def test_method_wins_over_the_deprecated_field(self, submit: Submit) -> None:
        method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 5}}}
        assert submit(method=method, hyperparameters={"n_epochs": 9}).json()["hyperparameters"]["n_epochs"] == 5

    def test_a_seed_is_made_up_when_absent(self, submit: Submit) -> None:
        assert submit(suffix="a").json()["seed"] != submit(suffix="b").json()["seed"]

    @pytest.mark.parametrize(
        ("suffix", "adapter"), [("Support Bot!", "support-bot"), ("ä-7", "7"), ("__x__", "x"), ("A.b", "a.b")]
    )
    def test_the_adapter_is_named_after_the_suffix(self, submit: Submit, suffix: str, adapter: str) -> None:
        assert submit(suffix=suffix).json()["adapter"] == adapter

    def test_lora_adapter_wins_over_the_suffix(self, submit: Submit) -> None:
        assert submit(lora={"adapter": "other"}).json()["adapter"] == "other"

    @pytest.mark.parametrize("suffix", [None, "ää", "--"])
    def test_a_job_without_an_adapter_name(self, submit: Submit, suffix: str | None) -> None:
        assert refused(submit(suffix=suffix), 422, "adapter_name_missing")["param"] == "lora.adapter"

    def test_empty_integrations_are_accepted(self, submit: Submit) -> None:
        assert submit(integrations=[]).status_code == 200

    def test_unknown_base_model(self, submit: Submit) -> None:
        error = refused(submit(model="no/such"), 422, "unknown_base_model")
        assert error["param"] == "model"
        assert "lora-depot base add" in error["message"]

    @pytest.mark.parametrize("name", ["https://evil/x", "../x", "//h/x", "x@main\n", "file:///etc", "a" * 500, "‥/x"])
    def test_a_base_model_is_never_a_path_or_url(self, submit: Submit, name: str) -> None:
        refused(submit(model=name), 422, "unknown_base_model")

    @pytest.mark.parametrize("field", ["training_file", "validation_file"])
    @pytest.mark.parametrize("value", [f"file-{uuid.uuid4().hex}", "rows.jsonl", ""])
    def test_missing_file(self, submit: Submit, field: str, value: str) -> None:
        error = refused(submit(**{field: value}), 422, "unknown_file")
        assert error["param"] == field
        assert "POST /v1/files" in error["message"]

    def test_a_file_of_another_purpose_or_tenant_is_missing_too(
        self, client: TestClient, submit: Submit, other_key: str
    ) -> None:
        base_file = upload(client, purpose="base-model").json()["id"]
        foreign = client.post(
            "/v1/files",
            files={"file": ("r", b'{"prompt": "a", "completion": "b"}')},
            data={"purpose": "fine-tune"},
            headers=bearer(other_key),
        ).json()["id"]
        answers = [
            refused(submit(training_file=f), 422, "unknown_file")
            for f in (base_file, foreign, f"file-{uuid.uuid4().hex}")
        ]
        assert answers[0] == answers[1] == answers[2]

    def test_unknown_target_module_names_what_exists(self, submit: Submit) -> None:
        error = refused(submit(lora={"target_modules": ["q_proj", "nope"]}), 422, "unknown_target_modules")
        assert error["param"] == "lora.target_modules"
        assert "nope" in error["message"]
        assert "k_proj" in str(error)

    @pytest.mark.parametrize(
        ("over", "param"),
        [
            ({"lora": {"r": 0}}, "lora.r"),
            ({"lora": {"r": -1}}, "lora.r"),
            ({"lora": {"r": 10**30}}, "lora.r"),
            ({"lora": {"r": 33}}, "lora.r"),
            ({"lora": {"lora_alpha": 0}}, "lora.lora_alpha"),
            ({"lora": {"lora_dropout": 1}}, "lora.lora_dropout"),
            ({"lora": {"learning_rate": 0}}, "lora.learning_rate"),
            ({"lora": {"learning_rate": 1e9}}, "lora.learning_rate"),
            ({"lora": {"warmup_ratio": 2}}, "lora.warmup_ratio"),
            ({"lora": {"max_length": 0}}, "lora.max_length"),
            ({"lora": {"max_steps": 0}}, "lora.max_steps"),
            ({"lora": {"max_grad_norm": 0}}, "lora.max_grad_norm"),
            ({"lora": {"target_modules": []}}, "lora"),
            ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
            ({"hyperparameters": {"batch_size": 10**9}}, "hyperparameters.batch_size"),
            ({"hyperparameters": {"learning_rate_multiplier": 0}}, "lora.learning_rate"),
            ({"hyperparameters": {"learning_rate_multiplier": -1.0}}, "lora.learning_rate"),
            (
                {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": -1}}}},
                "method.supervised.hyperparameters.n_epochs",
            ),
            ({"seed": -1}, "seed"),
            ({"seed": 2**64}, "seed"),
        ],
    )
    def test_a_number_out_of_range(self, submit: Submit, over: dict[str, Any], param: str) -> None:
        error = refused(submit(**over), 422, "invalid_hyperparameter")
        assert error["param"] == param
        assert f"{param.rpartition('.')[2]}" in error["message"]

    def test_r_zero_says_what_to_do(self, submit: Submit) -> None:
        assert "at least 1" in submit(lora={"r": 0}).json()["error"]["message"]

    @pytest.mark.parametrize(
        ("over", "param"),
        [
            ({"lora": {"r": True}}, "lora.r"),
            ({"lora": {"r": 8.0}}, "lora.r"),
            ({"lora": {"r": "8"}}, "lora.r"),
            ({"lora": {"use_rslora": 1}}, "lora.use_rslora"),
            ({"lora": {"learning_rate": "1e-4"}}, "lora.learning_rate"),
            ({"lora": {"target_modules": [1]}}, "lora.target_modules.0"),
            ({"lora": 3}, "lora"),
            ({"model": 5}, "model"),
            ({"seed": "7"}, "seed"),
            ({"metadata": {"a": 1}}, "metadata.a"),
        ],
    )
    def test_a_value_of_the_wrong_type(self, submit: Submit, over: dict[str, Any], param: str) -> None:
        response = submit(**over)
        assert response.status_code == 422
        error = response.json()["error"]
        assert error["code"] in {"invalid_type", "invalid_value"}
        assert error["param"] == param

    @pytest.mark.parametrize("value", ["once", True, 1.5])
    def test_hyperparameters_are_numbers_or_auto(self, submit: Submit, value: Any) -> None:
        error = submit(hyperparameters={"n_epochs": value}).json()["error"]
        assert error["param"] == "hyperparameters.n_epochs"
        assert "an integer or 'auto'" in error["message"]

    @pytest.mark.parametrize(
        ("over", "param"),
        [
            ({"suffix": "x" * 65}, "suffix"),
            ({"metadata": {f"k{n}": "v" for n in range(17)}}, "metadata"),
            ({"metadata": {"k": "v" * 513}}, "metadata.k"),
            ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 65),
            ({"integrations": [{"type": "wandb"}]}, "integrations"),
            ({"method": {"type": "dpo"}}, "method.type"),
        ],
    )
    def test_a_value_that_is_not_allowed(self, submit: Submit, over: dict[str, Any], param: str) -> None:
        assert refused(submit(**over), 422, "invalid_value")["param"] == param

    @pytest.mark.parametrize(
        ("over", "param", "allowed"),
        [
            ({"tenant_id": "x"}, "tenant_id", "training_file"),
            ({"state": "succeeded"}, "state", "training_file"),
            ({"lora": {"rank": 8}}, "lora.rank", "lora_alpha"),
            ({"lora": {"hf_token": "x"}}, "lora.hf_token", "lora_alpha"),
            ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs", "n_epochs"),
            ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "supervised"),
            (
                {"method": {"type": "supervised", "supervised": {"hyperparameters": {"lr": 1}}}},
                "method.supervised.hyperparameters.lr",
                "n_epochs",
            ),
        ],
    )
    def test_an_unknown_field_is_named_with_those_allowed(
        self, submit: Submit, over: dict[str, Any], param: str, allowed: str
    ) -> None:
        error = refused(submit(**over), 422, "unknown_field")
        assert error["param"] == param
        assert allowed in error["message"]

    def test_several_faults_are_all_listed(self, submit: Submit) -> None:
        error = submit(model=None, lora={"r": "x", "rank": 1}).json()["error"]
        assert error["code"] == "missing_field"
        assert error["param"] == "model"
        assert {e["param"] for e in error["details"]["errors"]} == {"model", "lora.r", "lora.rank"}

    def test_adapter_of_another_base(self, submit: Submit, sessions: SessionFactory) -> None:
        from tests.factories import make_base_model

        submit(lora={"adapter": "shared"})
        with transaction(sessions) as session:
            make_base_model(session, name="second")
        refused(submit(model="second", lora={"adapter": "shared"}), 422, "base_model_mismatch")

    @pytest.mark.parametrize("name", ["Upper", "../x", "", "a b", "-x", "x" * 129])
    def test_adapter_names_have_a_grammar(self, submit: Submit, name: str) -> None:
        refused(submit(lora={"adapter": name}), 422, "invalid_name")

    def test_quota(self, submit: Submit, sessions: SessionFactory, tenant_id: uuid.UUID) -> None:
        with transaction(sessions) as session:
            session.get_one(Tenant, tenant_id).max_queued = 1
        assert submit().status_code == 200
        refused(submit(suffix="second"), 429, "quota_exceeded")

    def test_no_refusal_leaves_a_traceback_or_a_job(
        self, submit: Submit, sessions: SessionFactory, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        for over in ({"model": "x"}, {"lora": {"r": 0}}, {"lora": {"target_modules": ["x"]}}, {"nope": 1}):
            response = submit(**over)
            assert 400 <= response.status_code < 500
        assert all(record.exc_info is None for record in caplog.records)
        with transaction(sessions) as session:
            assert session.scalar(select(func.count()).select_from(Job)) == 0


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
        assert body["error"] == {"code": "no_trainable_tokens", "message": "All rows are too long.", "param": None}

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

    @pytest.mark.parametrize("after", ["x", f"ftjob-{uuid.uuid4().hex}", "ftjob-" + "z" * 32])
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
