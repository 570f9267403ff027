"""Every kind of LoRA that PEFT writes, merged, against the logits of PEFT with the adapter unmerged."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.lora_core.recipes import TOKENS, logits_of, merge_to, randomize

LINEAR = ["q_proj", "v_proj", "down_proj"]
BOTH = ["embed_tokens", "lm_head"]


def make_adapter(base: Path, directory: Path, kind: type = peft.LoraConfig, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    given = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings
    if kind is peft.AdaLoraConfig:
        del given["r"]
    peft.get_peft_model(model, kind(**given)).save_pretrained(directory)
    return randomize(directory)


def peft_model(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return peft_model(base, adapter)(TOKENS).logits.float()


def assert_merged(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    """The merged checkpoint says what PEFT says with the adapter beside the base; the base says something else."""
    expected = peft_logits(base, adapter)
    merge_to(base, adapter, out, **options)
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
