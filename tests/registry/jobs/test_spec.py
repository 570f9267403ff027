import uuid
from typing import Any

import pytest
from pydantic import ValidationError

from lora_core.adalora_config import AdaLoraConfig
from registry.jobs.spec import LoraSpec, MergeSpec, TrainSpec


def test_alpha_is_twice_r_unless_given() -> None:
    assert LoraSpec().lora_alpha == 32
    assert LoraSpec(r=4).lora_alpha == 8
    assert LoraSpec.model_validate({"r": 4, "lora_alpha": None}).lora_alpha == 8
    assert LoraSpec(r=4, lora_alpha=5).lora_alpha == 5


def test_what_is_stored_of_adalora_reads_as_it_was() -> None:
    spec = TrainSpec.model_validate({"lora": {"adalora": {"init_r": 6, "target_r": 3}, "lora_alpha": 5}})
    assert TrainSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert (spec.lora.r, spec.lora.lora_alpha) == (6, 5)
    config = spec.lora.config(total_steps=spec.total_steps(rows=17))
    assert isinstance(config, AdaLoraConfig)
    assert (config.init_r, config.total_step, config.scaling_for("q_proj")) == (6, 9, 5 / (6 + 1e-5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 1025),
        ("r", "16"),
        ("r", True),
        ("r", 4.0),
        ("r", {}),
        ("r", []),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("target_modules", []),
        ("target_modules", "q_proj"),
        ("target_modules", ["../etc"]),
        ("target_modules", ["(a+)+$"]),
        ("target_modules", [""]),
        ("target_modules", [1]),
        ("use_rslora", "yes"),
        ("auto_mapping", {}),
    ],
)
def test_a_wrong_lora_setting_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        LoraSpec.model_validate({field: value})
    assert {error["loc"][:1] for error in caught.value.errors()} <= {(field,), ()}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_epochs", 0),
        ("n_epochs", 1001),
        ("n_epochs", "3"),
        ("batch_size", 0),
        ("batch_size", 4097),
        ("max_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", 1.1),
        ("learning_rate", float("nan")),
        ("lr_scheduler_type", "warp"),
        ("warmup_ratio", 1.5),
        ("weight_decay", -1.0),
        ("max_grad_norm", 0.0),
        ("max_length", 7),
        ("max_length", 131_073),
        ("seed", -1),
        ("seed", 2**63),
        ("trust_remote_code", True),
    ],
)
def test_a_wrong_training_setting_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainSpec.model_validate({field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_specs_survive_their_stored_form() -> None:
    train = TrainSpec(lora=LoraSpec(r=2, target_modules=["q_proj"], lora_dropout=0.1), max_steps=5)
    assert TrainSpec.model_validate(train.model_dump(mode="json")) == train
    merge = MergeSpec(version_id=uuid.uuid4(), dtype="bfloat16")
    assert MergeSpec.model_validate(merge.model_dump(mode="json")) == merge


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        TrainSpec().n_epochs = 5  # type: ignore[misc]  # frozen: this is what the test shows
