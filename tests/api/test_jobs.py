"""Submitting fine-tuning jobs: what is accepted, what is refused, and in which words."""

import logging
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from registry.db import SessionFactory, transaction
from registry.ids import parse_id
from registry.models import Job, Outbox, Tenant
from tests.api.conftest import BASE, bearer, refused, upload
from tests.factories import make_base_model

Submit = Callable[..., Any]


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
    @pytest.mark.parametrize("value", [f"file-{uuid.UUID(int=7).hex}", "rows.jsonl", ""])
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

    def test_every_setting_of_an_adapter_is_taken_and_shown(self, submit: Submit) -> None:
        given = {
            "r": 4,
            "target_modules": ["q_proj", "v_proj", "embed_tokens"],
            "exclude_modules": ["layers.0.self_attn.v_proj"],
            "layers_to_transform": [0, 1],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 3.0},
            "bias": "lora_only",
            "modules_to_save": ["lm_head", "layers.1.self_attn.o_proj"],
            "use_dora": True,
            "init_lora_weights": "gaussian",
            "loraplus_lr_ratio": 16.0,
        }
        shown = submit(lora=given).json()["lora"]
        assert {name: shown[name] for name in given} == given
        preset = submit(lora={"target_modules": "paper", "trainable_token_indices": [5, 3]}).json()["lora"]
        assert (preset["target_modules"], preset["trainable_token_indices"]) == ("paper", [5, 3])

    def test_adalora_is_taken_and_shown_with_what_it_means(self, submit: Submit) -> None:
        shown = submit(lora={"adalora": {"init_r": 10, "tinit": 1}}).json()["lora"]
        steps = {"init_r": 10, "target_r": 8, "tinit": 1, "tfinal": 0, "deltaT": 1}
        assert shown["adalora"] == steps | {"beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}
        assert (shown["r"], shown["lora_alpha"]) == (10, 20)
        assert submit(suffix="plain").json()["lora"]["adalora"] is None
        refused(submit(lora={"adalora": {"total_step": 5}}), 422, "unknown_field")

    def test_a_base_in_four_bits_is_asked_for_and_shown(self, submit: Submit, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            wide = make_base_model(session, name="wide")
            wide.facts = {**wide.facts, "linear_modules": {"model.layers.0.self_attn.q_proj": [64, 128]}}
        assert submit(model="wide", lora={"quantization": "nf4"}).json()["lora"]["quantization"] == "nf4"
        assert submit(suffix="other").json()["lora"]["quantization"] is None

    def test_parameters_of_experts_are_named_by_the_base_and_taken(
        self, client: TestClient, submit: Submit, sessions: SessionFactory
    ) -> None:
        with transaction(sessions) as session:
            base = make_base_model(session, name="moe", architecture="mixtral")
            base.facts = {**base.facts, "expert_parameters": {"model.layers.0.mlp.experts.down_proj": [4, 32, 16]}}
        names = client.get("/v1/base-models/moe").json()["expert_parameters"]
        assert names == ["mlp.experts.down_proj"]
        shown = submit(model="moe", lora={"target_modules": [], "target_parameters": names}).json()["lora"]
        assert (shown["target_modules"], shown["target_parameters"]) == ([], names)

    @pytest.mark.parametrize(
        ("lora", "code", "param", "words"),
        [
            ({"exclude_modules": ["nope"]}, "unknown_target_modules", "lora.exclude_modules", "nope; it has"),
            ({"modules_to_save": ["score"]}, "unknown_target_modules", "lora.modules_to_save", "score; it has"),
            ({"exclude_modules": ["q_proj"]}, "invalid_hyperparameter", "lora.target_modules", "No module is left"),
            ({"layers_to_transform": [7]}, "invalid_hyperparameter", "lora.target_modules", "No module is left"),
            ({"layers_to_transform": [-1]}, "invalid_hyperparameter", "lora", "layers_to_transform"),
            ({"rank_pattern": {"k_proj": 2}}, "invalid_hyperparameter", "lora.rank_pattern", "k_proj"),
            ({"rank_pattern": {"q_proj": 33}}, "invalid_hyperparameter", "lora.rank_pattern", "r = 33"),
            ({"rank_pattern": {"q_proj": 0}}, "invalid_hyperparameter", "lora", "rank_pattern"),
            ({"alpha_pattern": {"k_proj": 2}}, "invalid_hyperparameter", "lora.alpha_pattern", "k_proj"),
            ({"trainable_token_indices": [10**6]}, "invalid_hyperparameter", "lora.trainable_token_indices", "tokens"),
            ({"trainable_token_indices": [1, 1]}, "invalid_hyperparameter", "lora", "trainable_token_indices"),
            (
                {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
                "invalid_hyperparameter",
                "lora.trainable_token_indices",
                "already",
            ),
            (
                {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"},
                "invalid_hyperparameter",
                "lora.init_lora_weights",
                "linear layers",
            ),
            ({"use_dora": True, "init_lora_weights": "pissa"}, "invalid_hyperparameter", "lora", "use_dora"),
            ({"r": 600, "init_lora_weights": "olora"}, "invalid_hyperparameter", "lora", "twice the rank"),
            (
                {"target_parameters": ["mlp.experts.down_proj"]},
                "unknown_target_modules",
                "lora.target_parameters",
                "it has none",
            ),
            ({"target_parameters": ["down_proj"]}, "invalid_hyperparameter", "lora", "name the module"),
            (
                {"target_parameters": ["experts.down_proj"], "lora_dropout": 0.1},
                "invalid_hyperparameter",
                "lora",
                "lora_dropout",
            ),
            (
                {"target_parameters": ["experts.down_proj"], "init_lora_weights": "pissa"},
                "invalid_hyperparameter",
                "lora",
                "principal directions",
            ),
            ({"adalora": {}, "r": 8}, "invalid_hyperparameter", "lora", "target_r in adalora"),
            ({"adalora": {"init_r": 4}, "r": None}, "invalid_hyperparameter", "lora", "target_r must be at most"),
            ({"adalora": {"init_r": 33}, "r": None}, "invalid_hyperparameter", "lora.adalora", "r = 33"),
            ({"adalora": {"beta1": 1.0}, "r": None}, "invalid_hyperparameter", "lora.adalora.beta1", "less than 1"),
            ({"adalora": {"deltaT": 0}, "r": None}, "invalid_hyperparameter", "lora.adalora.deltaT", "at least 1"),
            ({"adalora": {"tinit": 2, "tfinal": 1}, "r": None}, "invalid_hyperparameter", "lora.adalora", "3 steps"),
            ({"adalora": {}, "r": None, "use_dora": True}, "invalid_hyperparameter", "lora", "use_dora means nothing"),
            ({"adalora": {}, "r": None, "rank_pattern": {"q_proj": 2}}, "invalid_hyperparameter", "lora", "AdaLoRA"),
            ({"adalora": {}, "r": None, "bias": "all"}, "invalid_hyperparameter", "lora", "cannot hold bias"),
            (
                {"adalora": {}, "r": None, "modules_to_save": ["lm_head"]},
                "invalid_hyperparameter",
                "lora",
                "cannot hold modules_to_save",
            ),
            (
                {"adalora": {}, "r": None, "target_modules": ["embed_tokens"]},
                "invalid_hyperparameter",
                "lora.adalora",
                "linear layers",
            ),
            ({"quantization": "nf4"}, "invalid_hyperparameter", "lora.quantization", "blocks of 64"),
            ({"loraplus_lr_ratio": 0.5}, "invalid_hyperparameter", "lora.loraplus_lr_ratio", "at least 1"),
        ],
    )
    def test_a_setting_that_the_base_model_cannot_have(
        self, submit: Submit, lora: dict[str, Any], code: str, param: str, words: str
    ) -> None:
        error = refused(submit(lora={"r": 4, "target_modules": ["q_proj"], **lora}), 422, code)
        assert error["param"] == param
        assert words in error["message"]

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
            ({"lora": {"eval_steps": 0}}, "lora.eval_steps"),
            ({"lora": {"early_stopping_patience": 0}}, "lora.early_stopping_patience"),
            ({"lora": {"early_stopping_patience": 1001}}, "lora.early_stopping_patience"),
            ({"lora": {"tokens_per_batch": 0}}, "lora.tokens_per_batch"),
            ({"lora": {"tokens_per_batch": 10**9}}, "lora.tokens_per_batch"),
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

    def test_every_setting_of_the_training_is_taken_and_shown(self, submit: Submit, file_id: str) -> None:
        given = {
            "eval_steps": 5,
            "early_stopping_patience": 3,
            "packing": False,
            "activation_checkpointing": True,
            "tokens_per_batch": 512,
        }
        shown = submit(lora=given, validation_file=file_id).json()["lora"]
        assert {name: shown[name] for name in given} == given
        plain = submit(suffix="plain").json()["lora"]
        assert [plain[name] for name in given] == [None, None, True, False, 4096]

    @pytest.mark.parametrize("name", ["eval_steps", "early_stopping_patience"])
    def test_an_evaluation_without_rows_to_evaluate_on(self, submit: Submit, name: str) -> None:
        error = refused(submit(lora={name: 2}), 422, "invalid_hyperparameter")
        assert error["param"] == f"lora.{name}"
        assert "validation_file" in error["message"]

    def test_r_zero_says_what_to_do(self, submit: Submit) -> None:
        assert "at least 1" in submit(lora={"r": 0}).json()["error"]["message"]

    @pytest.mark.parametrize(
        ("over", "param"),
        [
            ({"lora": {"r": True}}, "lora.r"),
            ({"lora": {"r": 8.0}}, "lora.r"),
            ({"lora": {"r": "8"}}, "lora.r"),
            ({"lora": {"use_rslora": 1}}, "lora.use_rslora"),
            ({"lora": {"packing": "no"}}, "lora.packing"),
            ({"lora": {"activation_checkpointing": 1}}, "lora.activation_checkpointing"),
            ({"lora": {"eval_steps": 2.5}}, "lora.eval_steps"),
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
            ({"lora": {"quantization": "int8"}}, "lora.quantization"),
            ({"method": {"type": "reinforcement"}}, "method.type"),
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
            ({"method": {"type": "supervised", "grader": {}}}, "method.grader", "supervised"),
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


PREFERENCES = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4


class TestDpo:
    def test_the_job_shows_its_method_and_beta(self, client: TestClient, submit: Submit) -> None:
        file_id = upload(client, PREFERENCES).json()["id"]
        method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}}
        job = submit(training_file=file_id, method=method).json()
        numbers = {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 1.0}
        assert job["method"] == {"type": "dpo", "supervised": None, "dpo": {"hyperparameters": numbers | {"beta": 0.3}}}
        assert job["hyperparameters"] == numbers

    def test_beta_has_a_default(self, client: TestClient, submit: Submit) -> None:
        file_id = upload(client, PREFERENCES).json()["id"]
        job = submit(training_file=file_id, method={"type": "dpo"}).json()
        assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.1

    def test_preferences_are_not_packed(self, client: TestClient, submit: Submit) -> None:
        file_id = upload(client, PREFERENCES).json()["id"]
        asked = {"training_file": file_id, "method": {"type": "dpo"}}
        assert submit(**asked, lora={"packing": False}).json()["lora"]["packing"] is False
        assert submit(**asked, suffix="other").json()["lora"]["packing"] is False
        error = refused(submit(**asked, lora={"packing": True}), 422, "invalid_hyperparameter")
        assert error["param"] == "lora.packing"

    def test_beta_out_of_range_is_named(self, client: TestClient, submit: Submit) -> None:
        file_id = upload(client, PREFERENCES).json()["id"]
        method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}
        error = refused(submit(training_file=file_id, method=method), 422, "invalid_hyperparameter")
        assert error["param"] == "method.dpo.hyperparameters.beta"

    def test_rows_must_be_those_of_the_method(self, client: TestClient, submit: Submit, file_id: str) -> None:
        preferences = upload(client, PREFERENCES).json()["id"]
        error = refused(submit(training_file=preferences), 422, "wrong_rows")
        assert error["param"] == "training_file"
        error = refused(submit(method={"type": "dpo"}), 422, "wrong_rows")
        assert "preferences" in error["message"]
        mixed = submit(training_file=preferences, validation_file=file_id, method={"type": "dpo"})
        assert refused(mixed, 422, "wrong_rows")["param"] == "validation_file"

    def test_settings_of_another_method_are_refused(self, submit: Submit) -> None:
        method = {"type": "supervised", "dpo": {"hyperparameters": {"beta": 0.3}}}
        assert "supervised" in refused(submit(method=method), 422, "invalid_value")["message"]
