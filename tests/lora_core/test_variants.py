"""DoRA, AdaLoRA, PiSSA and OLoRA through the whole path: trained, resumed, saved, read by PEFT and by us, merged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from lora_core.adalora_config import AdaLoraConfig
from lora_core.adapter import export_config, load_adapter, save_adapter
from lora_core.allocator import RankAllocator
from lora_core.checkpoint import Fingerprint
from lora_core.config import LoraConfig
from lora_core.data import IGNORED, Example
from lora_core.errors import BadConfig, KeyMismatch, ShapeMismatch
from lora_core.fingerprint import take_fingerprint
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE, check_adapter
from lora_core.inject import eject, inject, lora_layers
from lora_core.live import LiveModel
from lora_core.merge import merge
from lora_core.portable import to_plain_lora
from lora_core.state import TrainState, load_checkpoint, save_checkpoint
from lora_core.task import CausalLM
from lora_core.train import TrainConfig, train
from lora_core.trainable import trained_parameters
from lora_core.vllm import check_vllm
from tests.lora_core.kinds import Kind
from tests.lora_core.recipes import TOKENS, logits_of

TARGETS = ("q_proj", "v_proj", "down_proj")
ADALORA = AdaLoraConfig(
    init_r=4, target_r=1, lora_alpha=9, tinit=1, tfinal=2, deltaT=2, total_step=8, target_modules=TARGETS
)
CONFIGS = {
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True, lora_dropout=0.2, target_modules=TARGETS),
    "pissa": LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=TARGETS),
    "pissa_rank_stabilised": LoraConfig(
        r=4,
        lora_alpha=3,
        init_lora_weights="pissa",
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 5},
        target_modules=TARGETS,
    ),
    "olora": LoraConfig(r=4, lora_alpha=2, init_lora_weights="olora", target_modules=TARGETS),
    "adalora": ADALORA,
}
TRAIN = TrainConfig(n_epochs=8, batch_size=4, learning_rate=5e-2, lr_scheduler_type="constant", seed=1)


def example(first: int) -> Example:
    ids = np.arange(first, first + 12, dtype=np.int32)
    return Example(ids, np.where(np.arange(12) < 6, IGNORED, ids))


EXAMPLES = [example(first) for first in range(3, 7)]
every_variant = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def adapted(base: Path, config: LoraConfig) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    inject(model, config, seed=3)
    return model


def run(model: nn.Module, config: LoraConfig, settings: TrainConfig = TRAIN, **options: Any) -> Any:
    if isinstance(config, AdaLoraConfig):
        allocator = RankAllocator(model, config)
        options |= {"task": allocator.task(CausalLM()), "after_step": allocator.after_step}
    return train(model, EXAMPLES, settings, **options)


@torch.no_grad()
def say(model: nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits.float()


def peft_says(base: Path, adapter: Path) -> torch.Tensor:
    return say(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


@pytest.fixture(scope="module", params=CONFIGS, ids=CONFIGS)
def trained(request, tmp_path_factory: pytest.TempPathFactory, llama: Path):
    """A trained model, the adapter it saved, its configuration and the losses on the way."""
    torch.set_num_threads(1)
    config = CONFIGS[request.param]
    model, reports = adapted(llama, config), []
    run(model, config, on_step=reports.append)
    directory = tmp_path_factory.mktemp(request.param) / "adapter"
    save_adapter(model, config, directory)
    return model, directory, config, [report.loss for report in reports]


def test_training_learns_and_leaves_the_base_as_it_was(trained, llama):
    model, _, _, losses = trained
    assert losses[-1] < losses[0] - 0.2
    base = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    for path, layer in lora_layers(model).items():
        assert torch.equal(layer.base_layer.weight, base[f"{path}.weight"])


def test_peft_says_what_we_say_with_what_was_saved(trained, llama):
    model, directory, _, _ = trained
    check_adapter(directory)
    torch.testing.assert_close(peft_says(llama, directory), say(model), atol=3e-5, rtol=1e-5)
    assert (logits_of(llama) - say(model)).abs().max() > 0.05


def test_what_was_saved_is_loaded_and_saved_again_to_the_byte(trained, llama, tmp_path):
    model, directory, _, _ = trained
    again = AutoModelForCausalLM.from_pretrained(llama)
    config = load_adapter(again, directory)
    torch.testing.assert_close(say(again), say(model), atol=1e-5, rtol=1e-5)
    save_adapter(again, config, tmp_path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_the_merged_model_says_what_the_adapted_one_says(trained, llama, tmp_path):
    model, directory, _, _ = trained
    merge(llama, directory, tmp_path / "out")
    torch.testing.assert_close(logits_of(tmp_path / "out"), say(model), atol=3e-5, rtol=1e-5)


def test_ejected_the_base_says_what_it_said(llama):
    for config in CONFIGS.values():
        model = adapted(llama, config)
        eject(model)
        assert torch.equal(say(model), logits_of(llama))


@every_variant
def test_a_run_goes_on_from_any_step_with_the_same_bits(config, llama, tmp_path):
    states: list[TrainState] = []
    run(adapted(llama, config), config, on_checkpoint=states.append)
    assert [state.step for state in states] == [*range(1, 9)]
    for state in (states[0], states[3], states[5], states[6]):
        resumed: list[TrainState] = []
        run(adapted(llama, config), config, resume_from=state, on_checkpoint=resumed.append)
        assert resumed[-1].tensors.keys() == states[-1].tensors.keys()
        for name, tensor in states[-1].tensors.items():
            assert torch.equal(resumed[-1].tensors[name], tensor), name


def test_activation_checkpointing_changes_nothing(trained, llama):
    _, _, config, losses = trained
    settings, again = replace(TRAIN, activation_checkpointing=True), []
    run(adapted(llama, config), config, settings, on_step=lambda report: again.append(report.loss))
    assert again == pytest.approx(losses, rel=1e-5)


@every_variant
def test_a_variant_can_be_put_in_and_run_on_shapes_alone(config, llama):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama))
        inject(model, config, seed=0)
        model.train()(torch.zeros(2, 9, dtype=torch.int64)).logits.sum().backward()
        assert all(parameter.grad is not None for parameter in trained_parameters(model).values())


def test_a_checkpoint_holds_the_allocator(llama, tmp_path):
    states: list[TrainState] = []
    run(adapted(llama, ADALORA), ADALORA, on_checkpoint=states.append)
    save_checkpoint(tmp_path / "c", states[3], Fingerprint({}, {}))
    state, _ = load_checkpoint(tmp_path / "c")
    names = [name for name in state.tensors if name.startswith("layer.model.layers.0.self_attn.q_proj.")]
    assert len(names) == 7
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in states[3].tensors.items())


def test_no_variant_is_mistaken_for_another_when_a_run_goes_on(llama, tmp_path):
    def taken(config: LoraConfig) -> Fingerprint:
        model = adapted(llama, config)
        task = RankAllocator(model, config).task(CausalLM()) if isinstance(config, AdaLoraConfig) else CausalLM()
        return take_fingerprint(model, EXAMPLES, TRAIN, base_digest="0", task=task)

    others = {
        "plain": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
        "slower": replace(ADALORA, beta1=0.9),
        "rows": LoraConfig(target_modules=TARGETS, trainable_token_indices={"": (5, 3)}),
        "other_rows": LoraConfig(target_modules=TARGETS, trainable_token_indices={"": (5, 4)}),
    }
    configs = [*CONFIGS.values(), *others.values()]
    prints = [json.dumps(dict(taken(config).inputs), sort_keys=True) for config in configs]
    assert len(set(prints)) == len(configs)
    assert prints == [json.dumps(dict(taken(config).inputs), sort_keys=True) for config in configs]


def document(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG_FILE).read_text())


@pytest.mark.parametrize("name", ["pissa", "pissa_rank_stabilised", "olora"])
def test_a_changed_start_is_never_written(name, llama, tmp_path):
    config = CONFIGS[name]
    save_adapter(adapted(llama, config), config, tmp_path)
    assert document(tmp_path)["init_lora_weights"] is True
    assert document(tmp_path)["r"] == 8
    r = config.rank_for("model.layers.0.self_attn.v_proj")
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"].shape == (2 * r, 32)


def test_twice_a_rank_that_is_too_much_is_refused_before_training(llama):
    with pytest.raises(BadConfig, match="r must be a whole number"):
        adapted(llama, LoraConfig(r=513, init_lora_weights="pissa", target_modules=TARGETS))


def test_ranks_fall_to_the_budget_and_one_module_to_nothing(llama, tmp_path):
    config = replace(ADALORA, target_modules=(*TARGETS, "up_proj", "k_proj", "o_proj"))
    model = adapted(llama, config)
    run(model, config)
    save_adapter(model, config, tmp_path / "adapter")
    ranks = [sum(mask) for mask in document(tmp_path / "adapter")["rank_pattern"].values()]
    assert sum(ranks) == len(lora_layers(model)) == 12
    assert {0, 1, 2} <= set(ranks)
    torch.testing.assert_close(peft_says(llama, tmp_path / "adapter"), say(model), atol=3e-5, rtol=1e-5)
    merge(llama, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits_of(tmp_path / "out"), say(model), atol=3e-5, rtol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(llama)
    loaded = load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(say(again), say(model), atol=1e-5, rtol=1e-5)
    assert export_config(again, loaded) == loaded


def test_adalora_becomes_a_plain_lora(trained, llama, tmp_path):
    model, directory, config, _ = trained
    if not isinstance(config, AdaLoraConfig):
        return
    to_plain_lora(directory, tmp_path / "plain")
    written = document(tmp_path / "plain")
    assert written["peft_type"] == "LORA"
    assert written["rank_pattern"] == written["alpha_pattern"]
    ranks = {tensor.shape[0] for name, tensor in load_file(tmp_path / "plain" / WEIGHTS_FILE).items() if "_A" in name}
    assert 0 not in ranks
    torch.testing.assert_close(peft_says(llama, tmp_path / "plain"), say(model), atol=3e-5, rtol=1e-5)


def test_vllm_would_serve_what_is_a_plain_lora(trained, tmp_path):
    _, directory, config, _ = trained
    if isinstance(config, AdaLoraConfig):
        assert check_vllm(directory)
        to_plain_lora(directory, tmp_path / "plain")
        directory = tmp_path / "plain"
    assert bool(check_vllm(directory)) is config.use_dora


def test_variants_take_turns_and_share_a_batch_on_a_live_base(llama, tmp_path):
    said: dict[str | None, torch.Tensor] = {None: logits_of(llama)}
    live = LiveModel(AutoModelForCausalLM.from_pretrained(llama).eval())
    for name, config in CONFIGS.items():
        model = adapted(llama, config)
        for parameter in trained_parameters(model).values():
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        save_adapter(model, config, tmp_path / name)
        said[name] = say(model)
        live.load(name, tmp_path / name)
    for name in CONFIGS:
        live.use(name)
        torch.testing.assert_close(say(live.model), said[name], atol=1e-5, rtol=1e-5)
        assert live.merge(name) == []
        torch.testing.assert_close(say(live.model), said[name], atol=1e-5, rtol=1e-5)
    live.use(None)
    assert torch.equal(say(live.model), said[None])
    with torch.no_grad(), live.rows([*said]):
        rows = live.model(TOKENS.repeat(len(said), 1)).logits
    for row, expected in zip(rows, said.values(), strict=True):
        torch.testing.assert_close(row, expected[0], atol=1e-5, rtol=1e-5)


def test_a_peft_adalora_is_loaded(llama, tmp_path):
    settings = {"init_r": 4, "target_r": 2, "lora_alpha": 9, "total_step": 9, "task_type": "CAUSAL_LM"}
    config = peft.AdaLoraConfig(target_modules=list(TARGETS), **settings)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.data.normal_(0.0, 0.4, generator=generator)
    names = [name for name, _ in theirs.named_parameters() if "lora_E" in name]
    theirs.peft_config["default"].rank_pattern = {
        name.replace("base_model.model.", "").replace(".default", ""): [n < i % 5 for n in range(4)]
        for i, name in enumerate(names)
    }
    theirs.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(llama)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(say(model), peft_says(llama, tmp_path), atol=3e-5, rtol=1e-5)


def test_a_rank_pattern_that_does_not_fit_the_tensors_is_refused(llama, tmp_path):
    model = adapted(llama, ADALORA)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_E)
    save_adapter(model, ADALORA, tmp_path)
    check_adapter(tmp_path)
    for path, kept, error in (
        ("model.layers.0.self_attn.q_proj", [True, False, True, True], ShapeMismatch),
        ("model.layers.0.self_attn.o_proj", [True] * 4, KeyMismatch),
        ("model.layers.0.self_attn.q_proj", [True], BadConfig),
    ):
        changed = document(tmp_path) | {"rank_pattern": {f"{path}.lora_E": kept}}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(changed))
        with pytest.raises(error, match="rank_pattern"):
            check_adapter(tmp_path)


def test_a_module_that_a_variant_cannot_adapt_is_refused(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    for config in (ADALORA, CONFIGS["pissa"]):
        with pytest.raises(BadConfig, match="embed_tokens, a Embedding"):
            inject(model, replace(config, target_modules=("embed_tokens", "q_proj")), seed=0)


@every_variant
def test_variants_train_on_a_conv1d_too(config, tmp_path):
    config = replace(config, target_modules=("c_attn", "c_fc"), rank_pattern={}, alpha_pattern={})
    kind = Kind("gpt2")
    model = kind.build()
    inject(model, config, seed=0)
    run(model, config)
    save_adapter(model, config, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(kind.build(), tmp_path / "adapter").eval()
    torch.testing.assert_close(kind.say(theirs), kind.say(model), atol=3e-5, rtol=1e-5)
    assert (kind.say(model) - kind.say(kind.build())).abs().max() > 0.001
