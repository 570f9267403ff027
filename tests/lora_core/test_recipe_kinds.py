"""Every kind of LoRA that PEFT writes, merged, against the logits of PEFT with the adapter unmerged."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lora_core.keymap import Keymap
from lora_core.merge import merge
from tests.lora_core.recipes import TOKENS, carry_out, logits_of, merge_to, randomize, read_weights
from tests.tiny import make_base

LINEAR = ["q_proj", "v_proj", "down_proj"]
BOTH = ["embed_tokens", "lm_head"]


def make_adapter(base: Path, directory: Path, kind: type = peft.LoraConfig, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    given = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | copy.deepcopy(settings)  # PEFT writes to the lists
    if kind is peft.AdaLoraConfig:
        del given["r"]
    peft.get_peft_model(model, kind(**given)).save_pretrained(directory)
    return randomize(directory)


def peft_model(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return peft_model(base, adapter)(TOKENS).logits.float()


def assert_merged(base: Path, adapter: Path, out: Path, *, keymap: Keymap | None = None) -> Path:
    """The merged checkpoint says what PEFT says with the adapter beside the base; the base says something else."""
    expected = peft_logits(base, adapter)
    plan, exact = carry_out(base, adapter, keymap=keymap)
    merge(base, adapter, out, recipe=plan.recipe)
    merged = read_weights(out)
    assert merged.keys() == exact.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor.numpy(), exact[name], rtol=2e-7, atol=1e-12)
    assert (expected - logits_of(base)).abs().max() > 0.01
    torch.testing.assert_close(logits_of(out), expected, atol=3e-5, rtol=1e-5)
    return out


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=1)
    directory = tmp_path_factory.mktemp("gpt2") / "base"
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": LINEAR},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(q|o)_proj"},
        {"target_modules": LINEAR, "use_rslora": True},
        {"target_modules": LINEAR, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"target_modules": LINEAR, "alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 3, "q_proj": 30}},
        {"target_modules": LINEAR, "use_dora": True},
        {"target_modules": LINEAR, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 7}},
        {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "mlp"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        {"target_modules": BOTH},
        {"target_modules": ["q_proj"], "modules_to_save": BOTH},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3, 319]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [4]}},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    ],
)
def test_a_llama_of_each_kind_merges(tmp_path, llama, settings):
    adapter = make_adapter(llama, tmp_path / "adapter", **settings)
    assert_merged(llama, adapter, tmp_path / "out")


GPT2_MODULES = ["c_attn", "attn.c_proj", "c_fc"]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": GPT2_MODULES},
        {"target_modules": GPT2_MODULES, "use_dora": True},
        {"target_modules": GPT2_MODULES, "lora_bias": True},
        {"target_modules": ["c_attn"], "bias": "all"},
        {"target_modules": ["c_attn"], "bias": "lora_only"},
        {"target_modules": ["c_attn"], "bias": "lora_only", "lora_bias": True},
        {"target_modules": ["c_attn", "lm_head"]},  # PEFT then writes fan_in_fan_out: false
        {"target_modules": ["wte"]},
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [3, 9]}},
        {"target_modules": ["c_attn"], "modules_to_save": ["wpe", "ln_f"]},
    ],
)
def test_a_gpt2_of_each_kind_merges_with_and_without_the_checkpoint_prefix(tmp_path, gpt2, settings, prefix):
    base = gpt2 if prefix else without_prefix(gpt2, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    assert_merged(base, adapter, tmp_path / "out")


def without_prefix(base: Path, directory: Path) -> Path:
    """As GPT-2 lies on the Hub: the trunk alone."""
    directory.mkdir()
    shutil.copy(base / "config.json", directory)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in read_weights(base).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("tied") / "base", tie=True, tokenizer=False)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("settings", "differ"),
    [
        ({"target_modules": ["embed_tokens"]}, True),
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": BOTH}, True),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": BOTH}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 3]}}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 3], "embed_tokens": [5]}}, True),
        # PEFT shares new rows between the two sides, and the merge keeps them shared
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 3]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5], "embed_tokens": [5]}}, False),
        ({"target_modules": ["q_proj"]}, False),
    ],
)
def test_a_tied_base_is_untied_exactly_if_its_sides_differ(tmp_path, tied, settings, differ):
    # On one side of a tie PEFT trains against the base's matrix on the other. Merged into the one matrix that both
    # sides share, as PEFT's own merge_and_unload does, the other side would change as well: another model.
    adapter = make_adapter(tied, tmp_path / "adapter", **settings)
    out = assert_merged(tied, adapter, tmp_path / "out")
    assert (HEAD in read_weights(out)) is differ
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is not differ


def test_merging_one_side_of_a_tie_is_where_peft_errs(tmp_path, tied):
    """The reason for untying: if this fails, PEFT has learned to, and the comment above can go."""
    adapter = make_adapter(tied, tmp_path / "adapter", target_modules=["embed_tokens"])
    with torch.no_grad():
        by_peft = peft_model(tied, adapter).merge_and_unload()(TOKENS).logits
    assert (by_peft - peft_logits(tied, adapter)).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings", [{"target_modules": BOTH}, {"target_modules": ["q_proj"], "modules_to_save": BOTH}]
)
def test_sides_that_peft_keeps_equal_are_equal_after_the_merge(tmp_path, tied, settings):
    adapter = make_adapter(tied, tmp_path / "adapter", ensure_weight_tying=True, **settings)
    tensors = load_file(adapter / "adapter_model.safetensors")  # made different by randomize; PEFT stores equal ones
    lm_head, embedding = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
    if "modules_to_save" in settings:
        tensors[f"{lm_head}.weight"] = tensors[f"{embedding}.weight"].clone()
    else:
        tensors[f"{lm_head}.lora_A.weight"] = tensors[f"{embedding}.lora_embedding_B"].T.contiguous()
        tensors[f"{lm_head}.lora_B.weight"] = tensors[f"{embedding}.lora_embedding_A"].T.contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    out = assert_merged(tied, adapter, tmp_path / "out")
    merged = read_weights(out)
    torch.testing.assert_close(merged[HEAD], merged[EMBEDDING], atol=0, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [5, 3]}])
def test_a_tie_whose_sides_are_both_stored_is_kept_in_two(tmp_path, tied, settings):
    base = tmp_path / "base"
    shutil.copytree(tied, base)
    tensors = read_weights(base)
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj"]} | settings)
    assert_merged(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("tie", [True, False])
def test_a_resized_vocabulary_comes_with_the_adapter(tmp_path, tie):
    base = make_base(tmp_path / "base", tie=tie, tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(328)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", *BOTH], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    randomize(tmp_path / "adapter")
    resized = AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(328)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(resized, tmp_path / "adapter").eval()(TOKENS).logits
    out = merge_to(base, tmp_path / "adapter", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 328
    torch.testing.assert_close(logits_of(out), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("pruned", [False, True])
def test_adalora_merges_with_the_rank_it_was_pruned_to(tmp_path, llama, pruned):
    model = AutoModelForCausalLM.from_pretrained(llama)
    config = peft.AdaLoraConfig(
        target_modules=LINEAR, init_r=6, target_r=2, lora_alpha=9, total_step=10, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    if pruned:
        prune(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    ranks = {
        tensor.shape[0]
        for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
        if "lora_E" in name
    }
    assert ranks == ({0, 1, 2, 3, 4, 5} if pruned else {6})
    randomize(tmp_path / "adapter", scale=0.5)
    assert_merged(llama, tmp_path / "adapter", tmp_path / "out")


def prune(adapted: Any) -> None:
    """As AdaLoRA's allocator does: a mask of kept ranks for each module, here 0 to 5 of them."""
    layers = [name for name, _ in adapted.named_parameters() if "lora_E" in name]
    pattern = {
        name.replace("base_model.model.", "").replace(".default", ""): [n < number % 6 for n in range(6)]
        for number, name in enumerate(layers)
    }
    adapted.peft_config["default"].rank_pattern = pattern


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_merge(tmp_path, dora):
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = torch.nn.Conv2d(3, 8, (3, 2), padding=1)
            self.narrow = torch.nn.Conv2d(8, 4, 1)
            self.line = torch.nn.Conv1d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.line(self.narrow(self.wide(x).relu()).flatten(2))

    net, (base, adapter) = Net(), (tmp_path / "base", tmp_path / "adapter")
    base.mkdir()
    save_file(net.state_dict(), base / "model.safetensors")
    (base / "config.json").write_text("{}")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["wide", "narrow", "line"], use_dora=dora)
    adapted = peft.get_peft_model(net, config)
    adapted.save_pretrained(adapter)
    randomize(adapter)
    adapted.load_adapter(adapter, "loaded")
    adapted.set_adapter("loaded")
    merged = Net()
    merged.load_state_dict(read_weights(merge_to(base, adapter, tmp_path / "out")))
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        expected = adapted.eval()(x)
        assert (expected - merged(x)).abs().max() < 1e-5
        merged.load_state_dict(read_weights(base))
        assert (expected - merged(x)).abs().max() > 0.01


def test_a_fused_projection_is_one_matrix(tmp_path):
    base = make_base(tmp_path / "base", "phi3", tokenizer=False)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["qkv_proj", "gate_up_proj"], use_dora=True)
    assert_merged(base, adapter, tmp_path / "out")
