"""Every kind of layer and of adapter, against PEFT: what one writes, the other reads, and both say the same."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from lora_core.adapter import adapter_tensors, has_learned, load_adapter, save_adapter
from lora_core.data import Example
from lora_core.errors import BadAdapter, BadConfig, KeyMismatch, ShapeMismatch, UnknownTargetModules
from lora_core.gate import WEIGHTS_FILE, check_adapter
from lora_core.inject import adapter_disabled, adapter_layers, eject, inject
from lora_core.keymap_torch import build_keymap
from lora_core.merge import merge
from lora_core.plan import plan_merge
from lora_core.shards import open_checkpoint
from lora_core.train import TrainConfig, train
from lora_core.trainable import trained_parameters
from tests.lora_core.kinds import KINDS, TASKS, Kind
from tests.lora_core.recipes import merge_to, read_weights

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """All that is trained, away from where it starts."""
    generator = torch.Generator().manual_seed(5)
    for parameter in trained_parameters(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def by_peft(kind: Kind) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied embeddings, which is what some kinds are for
        model = peft.get_peft_model(kind.build(), kind.peft_config())
    randomize(model)
    return model.eval()


def by_us(kind: Kind) -> nn.Module:
    model = kind.build()
    inject(model, kind.config(), 0)
    randomize(model)
    return model


def learned(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file but for copies of the base."""
    found = load_file(directory / WEIGHTS_FILE)
    return {name: tensor for name, tensor in found.items() if not name.endswith("base_layer.weight")}


@every_kind
def test_peft_says_what_we_say_with_what_we_saved(tmp_path, kind):
    model = by_us(kind)
    said = kind.say(model)
    save_adapter(model, kind.config(), tmp_path)
    check_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(kind.build(), tmp_path).eval()
    torch.testing.assert_close(kind.say(theirs), said, atol=2e-5, rtol=1e-5)
    assert (said - kind.say(kind.build())).abs().max() > 0.01


@every_kind
def test_we_say_what_peft_says_with_what_it_saved(tmp_path, kind):
    theirs = by_peft(kind)
    said = kind.say(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = kind.build()
    config = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(kind.say(model), said, atol=2e-5, rtol=1e-5)
    save_adapter(model, config, tmp_path / "ours")
    ours, theirs = learned(tmp_path / "ours"), learned(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@every_kind
def test_a_disabled_or_ejected_adapter_leaves_the_base_bit_for_bit(kind):
    model, base = by_us(kind), kind.say(kind.build())
    with adapter_disabled(model):
        assert torch.equal(kind.say(model), base)
    assert not torch.equal(kind.say(model), base)
    eject(model)
    assert torch.equal(kind.say(model), base)
    assert model.state_dict().keys() == kind.build().state_dict().keys()


@every_kind
def test_a_fresh_adapter_says_what_the_base_says_and_has_learned_nothing(kind):
    model = kind.build()
    inject(model, kind.config(), 0)
    assert not has_learned(model)
    torch.testing.assert_close(kind.say(model), kind.say(kind.build()), atol=1e-6, rtol=0)


@every_kind
def test_as_much_is_trained_as_in_peft_and_all_of_it_gets_a_gradient(kind):
    model = by_us(kind)
    with torch.enable_grad():
        say = Kind.say.__wrapped__
        say(kind, model).square().mean().backward()
    trained = trained_parameters(model)
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    sizes = sorted(parameter.numel() for parameter in trained.values())
    assert sizes == sorted(parameter.numel() for parameter in trained_parameters(by_peft(kind)).values())


def gradients(kind: Kind, model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.enable_grad():
        Kind.say.__wrapped__(kind, model).square().mean().backward()
    return {name: tensor.grad for name, tensor in tensors.items()}


def name_in_file(parameter: str) -> str:
    short = parameter.replace(".modules_to_save.default.", ".").replace(".default", "")
    return short.replace("magnitude_vector.weight", "magnitude_vector")


@every_kind
def test_gradients_are_those_of_peft(tmp_path, kind):
    save_adapter(by_us(kind), kind.config(), tmp_path)
    ours, theirs = kind.build(), peft.PeftModel.from_pretrained(kind.build(), tmp_path, is_trainable=True).eval()
    load_adapter(ours, tmp_path)
    trained = {name_in_file(name): value for name, value in trained_parameters(theirs).items()}
    expected = gradients(kind, theirs, trained)
    found = gradients(kind, ours, adapter_tensors(ours))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@every_kind
def test_each_trained_tensor_alone_is_something_learned(kind):
    model = kind.build()
    inject(model, kind.config(), 0)
    for name, parameter in trained_parameters(model).items():
        # the other factor is zero; and magnitudes never move without it
        if name.endswith(("lora_A", "lora_embedding_B", "lora_magnitude_vector")):
            continue
        before = parameter.detach().clone()
        parameter.data.add_(0.1)
        assert has_learned(model), name
        parameter.data.copy_(before)


@every_kind
def test_a_base_in_bfloat16_is_computed_with_in_bfloat16(tmp_path, kind):
    save_adapter(by_us(kind), kind.config(), tmp_path)
    ours, theirs = kind.build().bfloat16(), kind.build().bfloat16()
    load_adapter(ours, tmp_path)
    assert {parameter.dtype for parameter in trained_parameters(ours).values()} == {torch.float32}
    kinds: set[torch.dtype] = set()
    hooks = [m.register_forward_hook(lambda m, x, y: kinds.add(y.dtype)) for m in adapter_layers(ours).values()]
    said = kind.say(ours, torch.bfloat16)
    assert [hook.remove() for hook in hooks]
    assert kinds <= {torch.bfloat16}
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    exact = kind.say(by_us(kind))
    error = (kind.say(theirs, torch.bfloat16) - exact).abs().max()
    assert (said - exact).abs().max() < 2 * error + 0.02


@every_kind
def test_the_start_depends_on_seed_and_paths_alone(kind):
    first, second = kind.build(), kind.build()
    inject(first, kind.config(), 7)
    torch.rand(100)
    for layer in list(adapter_layers(first)):  # another order of modules
        parent, _, name = layer.rpartition(".")
        children = first.get_submodule(parent)._modules
        children[name] = children.pop(name)
    inject(second, kind.config(), 7)
    start, again = trained_parameters(first), trained_parameters(second)
    assert start.keys() == again.keys()
    assert all(torch.equal(parameter, again[name]) for name, parameter in start.items())


def write_base(kind: Kind, directory: Path) -> Path:
    model = kind.build()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(directory)
    else:
        directory.mkdir()
        save_file(model.state_dict(), directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text("{}")
    return directory


def say_merged(kind: Kind, base: Path, adapter: Path, out: Path) -> torch.Tensor:
    if kind.model == "convolutions":
        merged = kind.build()
        merged.load_state_dict(read_weights(merge_to(base, adapter, out)))
        return kind.say(merged)
    config = json.loads((base / "config.json").read_text())
    keymap = build_keymap(config, open_checkpoint(base).tensors())
    merge(base, adapter, out, recipe=plan_merge(base, adapter, keymap=keymap).recipe)
    return kind.say(AutoModelForCausalLM.from_pretrained(out).eval())


MERGED = {name: kind for name, kind in KINDS.items() if TASKS.get(kind.model) != "SEQ_CLS"}


@pytest.mark.parametrize("kind", MERGED.values(), ids=MERGED)
def test_the_merged_model_says_what_the_adapted_one_says(tmp_path, kind):
    base, model = write_base(kind, tmp_path / "base"), by_us(kind)
    save_adapter(model, kind.config(), tmp_path / "adapter")
    merged = say_merged(kind, base, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(merged, kind.say(model), atol=3e-5, rtol=1e-5)


TRAINED = (
    "gpt2_conv1d_bias_all",
    "gpt2_embedding",
    "gpt2_saved",
    "tied_tokens",
    "tied_both_ends",
    "llama_saved_ends",
    "llama_token_outputs",
    "qwen2_lora_bias",
    "gpt_neox_fused",
)


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_adapter_is_saved_loaded_and_merged(tmp_path, name):
    kind = KINDS[name]
    base, model = write_base(kind, tmp_path / "base"), kind.build()
    inject(model, kind.config(), 0)
    before = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    tokens = [torch.randint(3, 40, (9,), generator=torch.Generator().manual_seed(row)).numpy() for row in range(8)]
    train(model, [Example(ids, ids) for ids in tokens], TrainConfig(n_epochs=3, batch_size=4, learning_rate=0.02))
    assert [name for name, value in trained_parameters(model).items() if torch.equal(value, before[name])] == []
    save_adapter(model, kind.config(), tmp_path / "adapter")
    loaded = kind.build()
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(kind.say(loaded), kind.say(model))
    merged = say_merged(kind, base, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(merged, kind.say(model), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2_conv1d_bias_all", "tied_tokens", "llama_saved_ends"])
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(tmp_path, name):
    kind = KINDS[name]
    tokens = [torch.randint(3, 40, (9,), generator=torch.Generator().manual_seed(row)).numpy() for row in range(8)]
    examples, settings = (
        [Example(ids, ids) for ids in tokens],
        TrainConfig(n_epochs=2, batch_size=4, learning_rate=0.02),
    )

    def run(**over) -> nn.Module:
        model = kind.build()
        inject(model, kind.config(), 0)
        train(model, examples, settings, **over)
        return model

    states = []
    straight = trained_parameters(run(on_checkpoint=states.append))
    assert len(states) == 4
    for state in states[:-1]:
        resumed = trained_parameters(run(resume_from=state))
        assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def saved(kind: Kind, directory: Path, change=lambda tensors: None, **settings) -> Path:
    """An adapter of PEFT with other tensors and settings than it wrote."""
    by_peft(kind).save_pretrained(directory)
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_FILE)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | settings))
    return directory


MODEL = "base_model.model.model."
GPT2 = "base_model.model.transformer."
Q = f"{MODEL}layers.0.self_attn.q_proj"
ROWS = f"{MODEL}embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("name", "change", "settings", "error", "words"),
    [
        ("llama_embedding", lambda t: t[f"{MODEL}embed_tokens.base_layer.weight"].add_(1), {}, BadAdapter, "another"),
        ("llama_embedding", lambda t: t.pop(f"{MODEL}embed_tokens.lora_embedding_B"), {}, KeyMismatch, "embedding_B"),
        ("llama_saved_norm", lambda t: t.pop(f"{MODEL}norm.weight"), {}, KeyMismatch, "norm"),
        ("llama_saved_norm", lambda t: None, {"modules_to_save": None}, KeyMismatch, "modules_to_save"),
        ("llama_tokens", lambda t: t.pop(ROWS), {}, KeyMismatch, "trainable_tokens_delta"),
        ("llama_tokens", lambda t: None, {"trainable_token_indices": [1, 2]}, KeyMismatch, "trainable_token_indices"),
        ("llama_tokens", lambda t: None, {"trainable_token_indices": None}, KeyMismatch, "trainable_token_indices"),
        ("llama_tokens", lambda t: None, {"trainable_token_indices": [1, 2, 64]}, BadConfig, "64 tokens"),
        ("llama_tokens", lambda t: t.update({ROWS: t[ROWS][:, 1:].contiguous()}), {}, ShapeMismatch, "delta"),
        ("gpt2_conv1d_bias_all", lambda t: t.pop(f"{GPT2}ln_f.bias"), {}, KeyMismatch, "ln_f.bias"),
        ("gpt2_conv1d_bias_all", lambda t: None, {"bias": "none"}, KeyMismatch, "bias"),
        ("gpt2_conv1d_bias_lora_only", lambda t: None, {"bias": "none"}, KeyMismatch, "base_layer.bias"),
        ("gpt2_conv1d_lora_bias", lambda t: None, {"lora_bias": False}, KeyMismatch, "bias"),
        ("gpt2_conv1d", lambda t: None, {"lora_bias": True}, KeyMismatch, "bias"),
        ("gpt2_conv1d", lambda t: [x.zero_() for x in t.values()], {}, BadAdapter, "changes nothing"),
        ("llama_saved_norm", lambda t: [x.zero_() for x in t.values()], {}, BadAdapter, "changes nothing"),
        ("convolutions", lambda t: t.popitem(), {}, KeyMismatch, "lora_"),
        # what no layer would use is never left lying
        ("llama_linear", lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(1)}), {}, KeyMismatch, "lora_C"),
        ("llama_linear", lambda t: t.update({f"{Q}.lora_E": torch.ones(3, 1)}), {}, KeyMismatch, "lora_E"),
        ("llama_linear", lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)}), {}, KeyMismatch, "magn"),
        ("llama_linear", lambda t: t.update({f"{Q}.base_layer.weight": torch.ones(16, 16)}), {}, BadAdapter, "another"),
        ("llama_linear", lambda t: t.update({f"{Q}.base_layer.bias": torch.ones(16)}), {}, KeyMismatch, "bias"),
        ("llama_linear", lambda t: t.update({f"{MODEL}norm.weight": torch.ones(16)}), {}, KeyMismatch, "norm.weight"),
        ("llama_linear", lambda t: t.update({f"{MODEL}embed_tokens.weight": torch.ones(1)}), {}, KeyMismatch, "embed"),
        ("llama_linear", lambda t: t.update({"lora_A.weight": torch.ones(1)}), {}, KeyMismatch, "does not begin"),
        (
            "llama_linear",
            lambda t: t.update({n.replace(".1.", ".2."): x.clone() for n, x in [*t.items()]}),
            {},
            KeyMismatch,
            r"layers\.2",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_the_model_is_as_it_was(tmp_path, name, change, settings, error, words):
    kind = KINDS[name]
    model = kind.build()
    with pytest.raises(error, match=words):
        load_adapter(model, saved(kind, tmp_path / "adapter", change, **settings))
    assert not adapter_layers(model)
    assert torch.equal(kind.say(model), kind.say(kind.build()))


@pytest.mark.parametrize("name", ["tied_embedding", "tied_both_ends", "tied_saved_ends", "tied_tokens"])
def test_ties_that_peft_ensured_are_read(tmp_path, name):
    kind = KINDS[name]
    config = kind.peft_config()
    config.ensure_weight_tying = True
    theirs = peft.get_peft_model(kind.build(), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    model = kind.build()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(kind.say(model), kind.say(theirs), atol=2e-5, rtol=1e-5)


def test_a_regular_expression_of_targets_is_loaded_as_the_modules_that_it_matched(tmp_path):
    kind = Kind("llama", {"target_modules": r".*layers\.1\..*(q|o)_proj"})
    theirs = by_peft(kind)
    theirs.save_pretrained(tmp_path)
    model = kind.build()
    config = load_adapter(model, tmp_path)
    assert config.target_modules == ("model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_proj")
    torch.testing.assert_close(kind.say(model), kind.say(theirs), atol=2e-5, rtol=1e-5)


def test_names_that_peft_takes_more_widely_are_written_and_read_as_whole_paths(tmp_path):
    # To PEFT "norm" means every module whose name ends so: input_layernorm as well
    kind = Kind("llama", {"target_modules": ("q_proj",), "modules_to_save": ("norm",)})
    model = by_us(kind)
    save_adapter(model, kind.config(), tmp_path / "ours")
    assert check_adapter(tmp_path / "ours").config.modules_to_save == ("model.norm",)
    theirs = by_peft(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    again = kind.build()
    assert len(load_adapter(again, tmp_path / "theirs").modules_to_save) == 5
    torch.testing.assert_close(kind.say(again), kind.say(theirs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "all-linear"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "phi3", "bert"])
def test_presets_are_spelt_out_as_peft_finds_them(tmp_path, name, preset):
    kind = Kind(name, {"target_modules": preset})
    model = by_us(kind)
    save_adapter(model, kind.config(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(kind.build(), tmp_path).eval()
    torch.testing.assert_close(kind.say(theirs), kind.say(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "settings", "error", "words"),
    [
        ("llama", {"target_modules": ("mlp",)}, UnknownTargetModules, "mlp"),
        ("llama", {"target_modules": ("q_proj",), "modules_to_save": ("score",)}, UnknownTargetModules, "score"),
        ("llama", {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, BadConfig, "target_modules"),
        ("llama", {"target_modules": ("q_proj",), "lora_bias": True}, BadConfig, "bias of model.layers.0"),
        ("llama", {"target_modules": ("q_proj",), "fan_in_fan_out": True}, BadConfig, "fan_in_fan_out"),
        ("llama", {"trainable_token_indices": {"q_proj": (1,)}}, BadConfig, "2 modules"),
        ("llama", {"trainable_token_indices": {"": (64,)}}, BadConfig, "64 tokens"),
        (
            "llama",
            {"target_modules": ("embed_tokens",), "trainable_token_indices": {"": (1,)}},
            BadConfig,
            "embed_tokens, which is adapted",
        ),
    ],
)
def test_what_a_model_cannot_be_is_said_and_changes_nothing(model, settings, error, words):
    kind = Kind(model, settings)
    base = kind.build()
    with pytest.raises(error, match=words):
        inject(base, kind.config(), 0)
    assert not adapter_layers(base)
    assert all(parameter.requires_grad for parameter in base.parameters())
