import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_core.algebra import combine, truncate
from lora_core.errors import BadAdapter, BadConfig
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE
from lora_core.vllm import check_vllm
from tests.lora_core.adapters import make_peft_adapter
from tests.tiny import randomize_adapter


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory) -> Path:
    return make_peft_adapter(llama, tmp_path_factory.mktemp("vllm") / "lora")


def edited(adapter: Path, directory: Path, **fields) -> Path:
    """The adapter with other fields in its config; None takes one out."""
    directory.mkdir()
    config = json.loads((adapter / CONFIG_FILE).read_text()) | fields
    (directory / CONFIG_FILE).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    save_file(load_file(adapter / WEIGHTS_FILE), directory / WEIGHTS_FILE)
    return directory


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
    ],
)
def test_what_vllm_serves_has_no_reasons_against_it(llama, tmp_path, settings):
    assert check_vllm(make_peft_adapter(llama, tmp_path, **settings)) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias is all"),
        ({"bias": "lora_only"}, "bias is lora_only"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_bdlora": {}}, None),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"modules_to_save": ["classifier", "score"]}, None),
        ({"r": 24}, "--max-lora-rank 32"),
        ({"rank_pattern": {"v_proj": 257}}, "--max-lora-rank 320"),
        ({"r": 600}, "512"),
        ({"r": None}, "lacks r"),
        ({"target_modules": None}, "lacks target_modules"),
        ({"peft_type": "ANYTHING"}, None),
    ],
)
def test_each_setting_that_vllm_refuses_is_named(adapter, tmp_path, fields, reason):
    reasons = check_vllm(edited(adapter, tmp_path / "edited", **fields))
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"trainable_token_indices": [1]}, "trainable_tokens_delta"),
    ],
)
def test_tensors_that_vllm_does_not_know_are_named(llama, tmp_path, settings, name):
    reasons = check_vllm(make_peft_adapter(llama, tmp_path, **settings))
    assert any(name in reason for reason in reasons)


def test_models_that_take_no_adapters_are_named(adapter):
    assert check_vllm(adapter, architecture="LlamaForCausalLM") == []
    assert "GPT2LMHeadModel" in check_vllm(adapter, architecture="GPT2LMHeadModel")[0]


def test_what_the_algebra_writes_is_served(llama, tmp_path):
    parts = [
        randomize_adapter(make_peft_adapter(llama, tmp_path / name, r=r), seed=r) for name, r in (("a", 12), ("b", 8))
    ]
    combine(parts, tmp_path / "sum", "cat")
    assert check_vllm(tmp_path / "sum", max_lora_rank=32) == []
    (reason,) = check_vllm(tmp_path / "sum")
    assert "--max-lora-rank 32" in reason
    truncate(tmp_path / "sum", tmp_path / "small", energy=0.9)
    truncate(tmp_path / "small", tmp_path / "smaller", rank=8)
    assert check_vllm(tmp_path / "smaller") == []


def test_a_folder_that_is_no_adapter_is_an_error(tmp_path, adapter):
    with pytest.raises(BadAdapter):
        check_vllm(tmp_path)
    broken = edited(adapter, tmp_path / "broken")
    (broken / CONFIG_FILE).write_text("[1]")
    with pytest.raises(BadConfig):
        check_vllm(broken)
