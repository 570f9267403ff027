"""LoRA of experts: PEFT's ParamWrapper as the oracle, files both ways, merges into per-expert checkpoints, training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lora_core.adapter import load_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.errors import BadConfig
from lora_core.experts import LoraExperts
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE, check_adapter
from lora_core.inject import adapter_disabled, adapter_layers, eject, inject
from lora_core.merge import merge
from lora_core.optimizer import make_optimizer
from lora_core.plan import plan_merge
from lora_core.state import TrainState
from lora_core.train import train
from lora_core.trainable import trained_parameters
from tests.lora_core.test_keymap import DOWN, GATE_UP, keymap_of, make_moe
from tests.lora_core.test_peft_matrix import randomize
from tests.lora_core.test_variants import EXAMPLES, TRAIN

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
TOKENS = torch.arange(3, 40)[None] % 60
BOTH = LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj",), target_parameters=(GATE_UP, DOWN))
CONFIGS = {
    "both": BOTH,
    "first": replace(BOTH, target_modules=(), target_parameters=(GATE_UP,)),
    "last": replace(BOTH, target_parameters=(DOWN,), use_rslora=True),
    "patterns": replace(
        BOTH,
        rank_pattern={"layers.1.mlp.experts.down_proj": 2},
        alpha_pattern={"mlp.experts.gate_up_proj": 9},
        init_lora_weights="gaussian",
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
CASES = {f"{family}_both": (family, BOTH) for family in FAMILIES}
CASES |= {f"mixtral_{name}": ("mixtral", config) for name, config in CONFIGS.items()}
CASES |= {"gpt_oss_patterns": ("gpt_oss", CONFIGS["patterns"])}
every_case = pytest.mark.parametrize(("family", "config"), CASES.values(), ids=CASES)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_moe(tmp_path_factory.mktemp(family) / "base", family) for family in FAMILIES}


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def adapted(base: Path, config: LoraConfig) -> nn.Module:
    model = load(base)
    inject(model, config, seed=3)
    return model


def by_peft(base: Path, config: LoraConfig) -> nn.Module:
    given = {"r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
    given |= {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern)}
    given |= {"target_modules": list(config.target_modules), "target_parameters": list(config.target_parameters)}
    model = peft.get_peft_model(load(base), peft.LoraConfig(**given, task_type="CAUSAL_LM"))
    randomize(model)
    return model.eval()


@torch.no_grad()
def say(model: nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits.float()


@every_case
def test_peft_says_what_we_say_with_what_we_saved(bases, tmp_path, family, config):
    model = adapted(bases[family], config)
    randomize(model)
    save_adapter(model, config, tmp_path)
    check_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(bases[family]), tmp_path)
    torch.testing.assert_close(say(theirs), say(model), atol=1e-4, rtol=1e-4)
    assert (say(model) - logits(bases[family])).abs().max() > 0.05


@every_case
def test_we_say_what_peft_says_with_what_it_saved(bases, tmp_path, family, config):
    theirs = by_peft(bases[family], config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(bases[family])
    loaded = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(say(model), say(theirs), atol=1e-4, rtol=1e-4)
    save_adapter(model, loaded, tmp_path / "ours")
    # PEFT writes its factors in the base's dtype, in another order of headers: the numbers are what must be equal
    again = load(bases[family])
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(say(again), say(model))


def test_a_weight_of_a_linear_layer_can_be_named_as_a_parameter(bases, tmp_path):
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=(),
        target_parameters=("q_proj.weight", "v_proj.weight"),
        rank_pattern={"q_proj.weight": 2},
        alpha_pattern={"layers.1.self_attn.v_proj.weight": 7},
    )
    model = adapted(bases["mixtral"], config)
    randomize(model)
    save_adapter(model, config, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load(bases["mixtral"]), tmp_path / "ours")
    torch.testing.assert_close(say(theirs), say(model), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load(bases["mixtral"])
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(say(again), say(model), atol=1e-5, rtol=1e-5)


@every_family
def test_gradients_are_those_of_peft(bases, tmp_path, family):
    theirs = by_peft(bases[family], BOTH)
    theirs.save_pretrained(tmp_path)
    model = load(bases[family])
    load_adapter(model, tmp_path)
    for module in (model, theirs):
        module(TOKENS, labels=TOKENS).loss.backward()
    ours = {name: p.grad for name, p in trained_parameters(model).items()}
    assert len(ours) == len(trained_parameters(theirs))
    for path, layer in adapter_layers(model).items():
        for name, attribute in layer.TENSORS.items():
            if f"{path}.{attribute}" in ours:
                other = theirs.base_model.model.get_parameter(f"{path}.{name}".replace(".weight", ".default.weight"))
                torch.testing.assert_close(ours.pop(f"{path}.{attribute}"), other.grad, atol=1e-4, rtol=1e-3)
    assert not ours


@every_case
def test_the_merged_model_says_what_the_adapted_one_says(bases, tmp_path, family, config):
    model = adapted(bases[family], config)
    randomize(model)
    save_adapter(model, config, tmp_path / "adapter")
    recipe = plan_merge(bases[family], tmp_path / "adapter", keymap=keymap_of(bases[family])).recipe
    merge(bases[family], tmp_path / "adapter", tmp_path / "out", recipe=recipe)
    torch.testing.assert_close(logits(tmp_path / "out"), say(model), atol=1e-4, rtol=1e-4)


def logits(base: Path) -> torch.Tensor:
    return say(load(base))


@every_family
def test_delta_weights_are_what_forward_adds(bases, family):
    model = adapted(bases[family], BOTH)
    randomize(model)
    for layer in list(adapter_layers(model).values()):
        if isinstance(layer, LoraExperts):
            assert layer.has_learned()
    expected = say(model)
    deltas = {}
    for path, layer in adapter_layers(model).items():
        added = layer.delta_weights() if isinstance(layer, LoraExperts) else {"weight": layer.delta_weight()}
        deltas |= {f"{path}.{name}": delta for name, delta in added.items()}
    eject(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta)
    torch.testing.assert_close(say(model), expected, atol=1e-4, rtol=1e-4)


@every_family
def test_a_fresh_disabled_or_ejected_adapter_leaves_the_base(bases, family):
    model, base = adapted(bases[family], BOTH), logits(bases[family])
    torch.testing.assert_close(say(model), base, atol=1e-5, rtol=1e-5)
    randomize(model)
    with adapter_disabled(model):
        assert torch.equal(say(model), base)
    eject(model)
    assert torch.equal(say(model), base)


def test_rescaling_is_a_scaling_of_what_is_added(bases):
    model = adapted(bases["mixtral"], BOTH)
    randomize(model)
    for layer in adapter_layers(model).values():
        layer.rescale(0.5)
    halved = say(model)
    eject(model)
    inject(model, replace(BOTH, lora_alpha=2.5), seed=3)
    randomize(model)
    torch.testing.assert_close(say(model), halved, atol=1e-5, rtol=1e-5)
    assert {layer.settings() for layer in adapter_layers(model).values() if isinstance(layer, LoraExperts)} == {
        (("gate_up_proj", 2.5 / 3), ("down_proj", 2.5 / 3))
    }


def test_the_start_depends_on_seed_and_paths_alone(bases):
    both, first = adapted(bases["mixtral"], BOTH), adapted(bases["mixtral"], CONFIGS["first"])
    name = "model.layers.1.mlp.experts.gate_up_proj_lora_A"
    starts = {model: trained_parameters(model)[name] for model in (both, first)}
    assert torch.equal(starts[both], starts[first])
    assert not torch.equal(starts[both], trained_parameters(both)[name.replace("layers.1", "layers.0")])
    bound = starts[both].shape[1] ** -0.5
    assert 0.9 * bound < starts[both].abs().max() <= bound


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_training_learns_and_goes_on_with_the_same_bits(bases, family):
    states: list[TrainState] = []
    losses: list[float] = []
    model = adapted(bases[family], BOTH)
    train(model, EXAMPLES, TRAIN, on_step=lambda report: losses.append(report.loss), on_checkpoint=states.append)
    assert losses[-1] < losses[0] - 0.2
    resumed: list[TrainState] = []
    train(adapted(bases[family], BOTH), EXAMPLES, TRAIN, resume_from=states[2], on_checkpoint=resumed.append)
    for name, tensor in states[-1].tensors.items():
        assert torch.equal(resumed[-1].tensors[name], tensor), name


def test_every_lora_b_of_an_expert_gets_the_rate_of_lora_plus(bases):
    model = adapted(bases["mixtral"], BOTH)
    named = trained_parameters(model)
    faster = make_optimizer(named, replace(TRAIN, loraplus_lr_ratio=4.0)).param_groups[-1]["params"]
    zeros = [parameter for parameter in named.values() if not parameter.any()]
    assert len(faster) == len(zeros) == 6
    assert {id(parameter) for parameter in faster} == {id(parameter) for parameter in zeros}


def test_the_file_says_since_when_its_factors_lie_so(bases, tmp_path):
    model = adapted(bases["mixtral"], BOTH)
    randomize(model)
    save_adapter(model, BOTH, tmp_path)
    document = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert document["peft_version"] == "0.19.1"
    for version in ("0.18.0", None):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(document | {"peft_version": version}))
        with pytest.raises(BadConfig, match=r"before PEFT 0\.19\.1"):
            check_adapter(tmp_path)
    assert (tmp_path / WEIGHTS_FILE).is_file()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_parameters": ("experts.up_proj",)}, "experts.up_proj, which the base model has not"),
        ({"target_parameters": ("q_proj.weight",)}, "in target_modules and"),
        ({"target_parameters": ("norm.weight",)}, "neither of experts nor"),
        ({"target_parameters": ("gate_up_proj",)}, "name the module"),
        ({"modules_to_save": ("layers.0.mlp",)}, "saved whole"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(bases, settings, reason):
    with pytest.raises(BadConfig, match=reason):
        adapted(bases["mixtral"], replace(BOTH, **settings))
