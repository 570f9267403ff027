"""The paper's preset where queries, keys and values are one layer: two LoRAs, and to PEFT one of twice the rank."""

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.adapter import load_adapter, save_adapter
from lora_core.errors import BadConfig
from lora_core.gate import check_adapter
from lora_core.inject import inject, lora_layers
from lora_core.merge import merge
from lora_core.query_value import query_and_value_rows
from lora_core.trainable import trained_parameters
from tests.lora_core.kinds import MODELS, Kind, causal

MODELS |= {
    "falcon_grouped": lambda: causal("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon_by_head": lambda: causal("falcon", multi_query=False, new_decoder_architecture=False),
    "bloom": lambda: causal("bloom", n_head=4, n_layer=2),
}
FAMILIES = ["gpt2", "gpt_neox", "falcon", "falcon_grouped", "falcon_by_head", "phi3", "bloom"]
SETTINGS = [{}, {"use_rslora": True, "init_lora_weights": "gaussian"}, {"alpha_pattern": {"1": 3}}]


def fused_layers(model: nn.Module) -> list[nn.Module]:
    names = ("c_attn", "query_key_value", "qkv_proj")
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]


@torch.no_grad()
def set_rows(model: nn.Module, rows: torch.Tensor, fill) -> None:
    for layer in fused_layers(model):
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        weight[rows] = fill(weight[rows])
        if layer.bias is not None:
            layer.bias[rows] = fill(layer.bias[rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_takes_these_rows_for_queries_and_those_for_values(family):
    kind = Kind(family)
    model = kind.build()
    layer = fused_layers(model)[0]
    size = layer.nf if isinstance(layer, Conv1D) else layer.out_features
    queries, values = query_and_value_rows(model.config, size)
    keys = torch.tensor(sorted({*range(size)} - {*queries.tolist()} - {*values.tolist()}))
    assert len(queries) + len(keys) + len(values) == size
    assert len(keys) == len(values)
    set_rows(model, keys, torch.zeros_like)  # then all positions weigh the same, whatever the queries are
    said = kind.say(model)
    set_rows(model, queries, torch.randn_like)
    torch.testing.assert_close(kind.say(model), said)
    set_rows(model, values, torch.zeros_like)
    silent = kind.say(model)
    assert not torch.allclose(silent, said, atol=1e-4)
    set_rows(model, keys, torch.randn_like)
    torch.testing.assert_close(kind.say(model), silent)


def adapted(kind: Kind) -> nn.Module:
    model = kind.build()
    inject(model, kind.config(), 0)
    generator = torch.Generator().manual_seed(5)
    for parameter in trained_parameters(model).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_and_we_read_two_loras_as_one_of_twice_the_rank(tmp_path, family, settings):
    if "alpha_pattern" in settings:
        settings = {"alpha_pattern": {next(iter(lora_layers(adapted(Kind(family, {"target_modules": "paper"}))))): 3}}
    kind = Kind(family, {"target_modules": "paper", **settings})
    model = adapted(kind)
    save_adapter(model, kind.config(), tmp_path)
    assert check_adapter(tmp_path).config.r == 6
    theirs = peft.PeftModel.from_pretrained(kind.build(), tmp_path).eval()
    torch.testing.assert_close(kind.say(theirs), kind.say(model), atol=2e-5, rtol=1e-5)
    again = kind.build()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(kind.say(again), kind.say(model), atol=2e-5, rtol=1e-5)


def test_keys_are_not_adapted_and_each_projection_has_the_rank_asked_for():
    model = adapted(Kind("gpt2", {"target_modules": "paper"}))
    for layer in lora_layers(model).values():
        queries, keys, values = layer.delta_weight().chunk(3, dim=1)
        assert torch.linalg.matrix_rank(queries) == torch.linalg.matrix_rank(values) == 3
        assert not keys.any()
    # as many numbers as two separate projections have: 2 layers · 2 · r · (in + out)
    assert sum(value.numel() for value in trained_parameters(model).values()) == 2 * 2 * 3 * (16 + 16)


def test_all_that_is_trained_gets_a_gradient_and_the_start_changes_nothing():
    kind = Kind("gpt2", {"target_modules": "paper"})
    model = kind.build()
    inject(model, kind.config(), 0)
    torch.testing.assert_close(kind.say(model), kind.say(kind.build()), atol=1e-6, rtol=0)
    Kind.say.__wrapped__(kind, model).square().mean().backward()
    gradients = {name: value.grad for name, value in trained_parameters(model).items()}
    assert all(gradient.any() for name, gradient in gradients.items() if name.endswith("lora_B"))


def test_merging_gives_the_same_model(tmp_path):
    kind = Kind("phi3", {"target_modules": "paper"})
    kind.build().save_pretrained(tmp_path / "base")
    model = adapted(kind)
    save_adapter(model, kind.config(), tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(kind.say(merged), kind.say(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"), [({"use_dora": True}, "plain LoRA only"), ({"r": 600}, r"r must be .* 1024")]
)
def test_what_the_two_cannot_be_is_said_before_training(settings, words):
    kind = Kind("gpt2", {"target_modules": "paper", **settings})
    with pytest.raises(BadConfig, match=words):
        inject(kind.build(), kind.config(), 0)


def test_a_family_whose_cut_is_not_known_is_refused():
    with pytest.raises(BadConfig, match="mpt"):
        query_and_value_rows(type("Config", (), {"model_type": "mpt"}), 48)
