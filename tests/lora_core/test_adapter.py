from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_core.adapter import load_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.errors import BadConfig, KeyMismatch, LoraError, ShapeMismatch, UnknownTargetModules
from lora_core.gate import check_adapter
from lora_core.inject import adapter_disabled, eject, inject, lora_layers
from lora_core.trainable import trained_parameters
from tests.lora_core.adapters import TOKENS, logits, make_peft_adapter
from tests.tiny import make_base

SETTINGS = [
    {"target_modules": ("q_proj", "v_proj")},
    {"target_modules": ("q_proj", "v_proj"), "use_rslora": True},
    {"target_modules": "all-linear", "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 7}},
    {"target_modules": ("k_proj", "layers.0.mlp.down_proj"), "alpha_pattern": {"k_proj": 3.5}},
    {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
]


def load(base: Path):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def randomize(model) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in trained_parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


@torch.no_grad()
def say(model) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_loads_what_we_save_and_says_the_same(tmp_path, llama, settings):
    model, config = load(llama), LoraConfig(r=4, lora_alpha=8, **settings)
    inject(model, config, 0)
    randomize(model)
    save_adapter(model, config, tmp_path)
    torch.testing.assert_close(logits(llama, tmp_path), say(model), atol=1e-6, rtol=0)  # another order of products
    assert (say(model) - logits(llama)).abs().max() > 0.01


@pytest.mark.parametrize("settings", SETTINGS)
def test_we_load_what_peft_saves_and_say_the_same(tmp_path, llama, settings):
    targets = settings["target_modules"]
    settings = settings | {"target_modules": targets if isinstance(targets, str) else list(targets)}
    adapter = make_peft_adapter(llama, tmp_path, **settings)
    model = load(llama)
    load_adapter(model, adapter)
    torch.testing.assert_close(say(model), logits(llama, adapter), atol=1e-6, rtol=0)


def test_files_survive_a_trip_through_peft_bit_for_bit(tmp_path, llama):
    model, config = load(llama), LoraConfig(r=4, lora_alpha=8)
    inject(model, config, 0)
    randomize(model)
    save_adapter(model, config, tmp_path / "ours")
    peft.PeftModel.from_pretrained(load(llama), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    again = load(llama)
    config = load_adapter(again, tmp_path / "theirs")
    save_adapter(again, config, tmp_path / "again")
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_equal_adapters_give_equal_bytes(tmp_path, llama):
    for directory in ("one", "two"):
        model, config = load(llama), LoraConfig(r=4)
        inject(model, config, 7)
        save_adapter(model, config, tmp_path / directory)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_all_linear_is_written_as_names(tmp_path, llama):
    model, config = load(llama), LoraConfig(r=4)
    paths = inject(model, config, 0)
    randomize(model)
    save_adapter(model, config, tmp_path)
    facts = check_adapter(tmp_path)
    assert facts.config.target_modules == (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    )  # fmt: skip
    assert sorted(facts.modules) == paths


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path, llama):
    wider = make_base(tmp_path / "wider", hidden=64)
    adapter = make_peft_adapter(wider, tmp_path / "adapter")
    model = load(llama)
    with pytest.raises(ShapeMismatch):
        load_adapter(model, adapter)
    assert not lora_layers(model)


@pytest.mark.parametrize("missing", [True, False])
def test_a_missing_or_a_surplus_module_is_a_key_mismatch(tmp_path, llama, missing):
    other = make_base(tmp_path / "other", layers=1 if missing else 3)
    adapter = make_peft_adapter(other, tmp_path / "adapter")
    with pytest.raises(KeyMismatch, match=r"layers\.1" if missing else r"layers\.2"):
        load_adapter(load(llama), adapter)


def test_a_nan_is_refused_on_loading(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(LoraError, match="NaN"):
        load_adapter(load(llama), adapter)


def test_injection_freezes_all_but_the_factors(llama):
    model = load(llama)
    inject(model, LoraConfig(r=2, target_modules=("v_proj",)), 0)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == [f"model.layers.{layer}.self_attn.v_proj.lora_{factor}" for layer in (0, 1) for factor in "AB"]
    assert len(trained_parameters(model)) == 4


def test_ejecting_gives_the_base_back(llama):
    model = load(llama)
    inject(model, LoraConfig(), 0)
    randomize(model)
    eject(model)
    assert not lora_layers(model)
    assert torch.equal(say(model), logits(llama))
    inject(model, LoraConfig(), 0)


def test_a_disabled_adapter_is_the_base_bit_for_bit_until_the_block_ends(llama):
    model = load(llama)
    inject(model, LoraConfig(), 0)
    randomize(model)
    adapted = say(model)
    with pytest.raises(ZeroDivisionError), adapter_disabled(model):
        assert torch.equal(say(model), logits(llama))
        _ = 1 / 0
    assert torch.equal(say(model), adapted)


def test_an_unknown_target_changes_nothing_in_the_model(llama):
    model = load(llama)
    with pytest.raises(UnknownTargetModules, match="q_proj"):
        inject(model, LoraConfig(target_modules=("q_proj", "query")), 0)
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_injecting_twice_is_refused(llama):
    model = load(llama)
    inject(model, LoraConfig(), 0)
    with pytest.raises(BadConfig, match="already"):
        inject(model, LoraConfig(), 0)
