"""What a base model cannot have is said before a job waits for it."""

import sys
from typing import Any

import pytest

from registry.errors import InvalidHyperparameter, UnknownTargetModules
from registry.jobs.lora_check import check_lora
from registry.jobs.spec import LoraSpec
from registry.models import BaseModel

PATHS = {f"transformer.h.{layer}.{name}": [48, 16] for layer in range(2) for name in ("attn.c_attn", "mlp.c_fc")}
GPT2 = BaseModel(architecture="gpt2", facts={"linear_modules": PATHS, "tied": True, "vocab_size": 64})

MIXTRAL = BaseModel(
    architecture="mixtral",
    facts={
        "linear_modules": {f"model.layers.{layer}.self_attn.q_proj": [16, 16] for layer in range(2)},
        "expert_parameters": {f"model.layers.{layer}.mlp.experts.down_proj": [4, 16, 8] for layer in range(2)},
        "tied": False,
        "vocab_size": 64,
    },
)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "paper"},
        {"target_modules": ["c_attn"], "use_dora": True},
        {"target_modules": ["c_attn", "wte"], "modules_to_save": ["lm_head", "h.1.mlp"]},
        {"target_modules": ["c_attn"], "trainable_token_indices": [63]},
        {"target_modules": "all-linear", "layers_to_transform": [1], "rank_pattern": {"c_fc": 16}},
    ],
)
def test_what_fits_is_let_through(lora: dict[str, Any]) -> None:
    check_lora(LoraSpec.model_validate({"r": 4, **lora}), GPT2)


@pytest.mark.parametrize(
    ("lora", "param"),
    [
        ({"target_modules": "paper", "use_dora": True}, "lora.target_modules"),
        ({"target_modules": "paper", "init_lora_weights": "pissa"}, "lora.target_modules"),
        ({"target_modules": ["c_attn"], "layers_to_transform": [2]}, "lora.target_modules"),
        ({"target_modules": ["wte"], "init_lora_weights": "olora"}, "lora.init_lora_weights"),
        ({"target_modules": ["wte"], "trainable_token_indices": [1]}, "lora.trainable_token_indices"),
        ({"target_modules": ["c_attn"], "trainable_token_indices": [64]}, "lora.trainable_token_indices"),
        ({"target_modules": "paper", "rank_pattern": {"c_fc": 2}}, "lora.rank_pattern"),
        ({"target_modules": ["c_fc"], "rank_pattern": {"h.0.mlp.c_fc": 17}}, "lora.rank_pattern"),
    ],
)
def test_what_does_not_is_refused_by_the_name_of_its_field(lora: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidHyperparameter) as caught:
        check_lora(LoraSpec.model_validate({"r": 4, **lora}), GPT2)
    assert caught.value.param == param


def test_nothing_of_gpt2_is_kept_in_four_bits() -> None:
    with pytest.raises(InvalidHyperparameter, match="no linear layers"):
        check_lora(LoraSpec.model_validate({"r": 4, "quantization": "nf4"}), GPT2)


@pytest.mark.parametrize(
    ("lora", "param"),
    [
        ({"modules_to_save": ["v_proj"]}, "lora.modules_to_save"),
        ({"modules_to_save": ["layers.1"]}, "lora.modules_to_save"),
        ({"modules_to_save": ["lm_head"]}, None),
        ({"bias": "all", "use_dora": True}, None),
        ({"adalora": {"init_r": 4, "target_r": 2}, "r": 4}, None),
    ],
)
def test_what_is_in_four_bits_is_not_trained_whole(lora: dict[str, Any], param: str | None) -> None:
    shapes = {f"model.layers.{layer}.self_attn.{name}_proj": [16, 128] for layer in range(2) for name in "qv"}
    shapes["lm_head"] = [64, 100]  # no block divides it, and it stays as it is
    base = BaseModel(architecture="llama", facts={"linear_modules": shapes, "tied": False, "vocab_size": 64})
    spec = LoraSpec.model_validate({"r": 4, "target_modules": ["q_proj"], "quantization": "nf4", **lora})
    if param is None:
        check_lora(spec, base)
        return
    with pytest.raises(InvalidHyperparameter) as caught:
        check_lora(spec, base)
    assert caught.value.param == param


DOWN = "mlp.experts.down_proj"


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": []},
        {"target_modules": ["q_proj"], "rank_pattern": {DOWN: 8, "q_proj": 16}, "use_rslora": True},
        {"alpha_pattern": {f"layers.1.{DOWN}": 3.0}, "init_lora_weights": "gaussian"},
    ],
)
def test_parameters_of_experts_are_let_through(lora: dict[str, Any]) -> None:
    check_lora(LoraSpec.model_validate({"r": 4, "target_parameters": [DOWN], **lora}), MIXTRAL)


@pytest.mark.parametrize(
    ("lora", "param", "error"),
    [
        ({"target_parameters": ["mlp.experts.up_proj"]}, "lora.target_parameters", UnknownTargetModules),
        ({"target_parameters": ["q_proj.weight"]}, "lora.target_parameters", UnknownTargetModules),
        ({"r": 9}, "lora.r", InvalidHyperparameter),
        ({"rank_pattern": {DOWN: 9}}, "lora.rank_pattern", InvalidHyperparameter),
        ({"rank_pattern": {"gate_up_proj": 2}}, "lora.rank_pattern", InvalidHyperparameter),
    ],
)
def test_parameters_that_the_base_has_not(lora: dict[str, Any], param: str, error: type[InvalidHyperparameter]) -> None:
    asked = {"r": 4, "target_modules": [], "target_parameters": [DOWN], **lora}
    with pytest.raises(error) as caught:
        check_lora(LoraSpec.model_validate(asked), MIXTRAL)
    assert caught.value.param == param


@pytest.mark.parametrize("field", ["exclude_modules", "modules_to_save"])
def test_as_many_names_as_there_may_be_are_not_compared_with_each_module(field: str) -> None:
    lora = LoraSpec.model_validate({"r": 4, field: [f"absent_{number}" for number in range(10_000)]})
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        with pytest.raises(UnknownTargetModules):
            check_lora(lora, GPT2)
    finally:
        sys.setprofile(None)
    assert calls < 60_000  # what there is to adapt may be hundreds of modules, and the API serves others meanwhile
