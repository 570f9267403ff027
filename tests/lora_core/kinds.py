"""Tiny models of each kind of layer, and configurations of each kind of adapter, for comparisons with PEFT."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_core.config import LoraConfig

TOKENS = torch.arange(3, 40).reshape(1, -1) % 64
QKV = ("q_proj", "v_proj")
BOTH = ("embed_tokens", "lm_head")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
OWN_NAMES = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, (3, 2), padding=1, stride=(2, 1))
        self.narrow = nn.Conv2d(8, 4, 1, padding="same", bias=False)
        self.line = nn.Conv1d(4, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.line(self.narrow(self.wide(x).relu()).flatten(2)).mean(-1))


def causal(family: str, **settings: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **SIZES | settings | OWN_NAMES.get(family, {}))
    )


def classifier(family: str) -> nn.Module:
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, num_labels=3, **SIZES))


@dataclass(frozen=True)
class Kind:
    """A base, by its name in MODELS, and an adapter of it; `settings` are LoraConfig's."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The base, with the same numbers each time; norms and biases are not ones and zeros."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MODELS[self.model]()
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
        return model.eval()

    def config(self) -> LoraConfig:
        return LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": TASKS.get(self.model, "CAUSAL_LM")} | self.settings)

    def peft_config(self) -> peft.LoraConfig:
        given = {"r": 3, "lora_alpha": 5, "task_type": TASKS.get(self.model, "CAUSAL_LM")} | self.settings
        tokens = given.get("trainable_token_indices", {})
        if tokens:
            rows = {name: list(found) for name, found in tokens.items()}
            given["trainable_token_indices"] = rows.get("", rows)
        return peft.LoraConfig(**{name: list(v) if isinstance(v, tuple) else v for name, v in given.items()})

    @torch.no_grad()
    def say(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if self.model == "convolutions":
            return model((torch.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4) / 60 - 1).to(dtype)).float()
        return model(TOKENS).logits.float()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: causal("llama", tie_word_embeddings=False),
    "tied": lambda: causal("llama", tie_word_embeddings=True),
    "gemma3": lambda: causal("gemma3_text", head_dim=4, tie_word_embeddings=True),
    "qwen2": lambda: causal("qwen2"),
    "gpt2": lambda: causal("gpt2"),
    "gpt_neox": lambda: causal("gpt_neox"),
    "falcon": lambda: causal("falcon"),
    "phi3": lambda: causal("phi3"),
    "bert": lambda: classifier("bert"),
    "classifier": lambda: classifier("llama"),
    "convolutions": Convolutions,
}
TASKS = {"bert": "SEQ_CLS", "classifier": "SEQ_CLS", "convolutions": None}

LLAMA = {
    "linear": {"target_modules": QKV},
    "rank_stabilised": {"target_modules": QKV, "use_rslora": True},
    "patterns": {
        "target_modules": (*QKV, "down_proj"),
        "rank_pattern": {"v_proj": 5, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "whole_paths": {"target_modules": ("model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")},
    "excluded": {"target_modules": (*QKV, "up_proj"), "exclude_modules": ("layers.0.self_attn.q_proj", "up_proj")},
    "layers": {"target_modules": QKV, "layers_to_transform": (1,), "layers_pattern": ("layers",)},
    "dropout": {"target_modules": QKV, "lora_dropout": 0.3},
    "gaussian": {"target_modules": QKV, "init_lora_weights": "gaussian"},
    "embedding": {"target_modules": ("embed_tokens", "q_proj")},
    "output": {"target_modules": ("lm_head",)},
    "both_ends": {"target_modules": (*BOTH, "v_proj")},
    "saved_norm": {"target_modules": QKV, "modules_to_save": ("model.norm",)},
    "saved_mlp": {"target_modules": QKV, "modules_to_save": ("layers.1.mlp", "lm_head")},
    "saved_ends": {"target_modules": QKV, "modules_to_save": BOTH},
    "tokens": {"target_modules": QKV, "trainable_token_indices": {"": (5, 3, 63)}},
    "token_outputs": {"target_modules": QKV, "trainable_token_indices": {"embed_tokens": (5, 3), "lm_head": (4,)}},
    "head_tokens": {"target_modules": QKV, "trainable_token_indices": {"lm_head": (5, 4)}},
}
TIED = ("embedding", "output", "both_ends", "saved_ends", "tokens", "token_outputs", "head_tokens")
CONV1D = {"target_modules": ("c_attn", "attn.c_proj", "c_fc")}
GPT2 = {
    "conv1d": CONV1D,
    "conv1d_bias_all": {**CONV1D, "bias": "all"},
    "conv1d_bias_lora_only": {**CONV1D, "bias": "lora_only"},
    "conv1d_lora_bias": {**CONV1D, "lora_bias": True},
    "conv1d_both_biases": {**CONV1D, "lora_bias": True, "bias": "lora_only"},
    "conv1d_and_output": {"target_modules": ("c_attn", "lm_head")},
    "embedding": {"target_modules": ("wte", "wpe")},
    "tokens": {"target_modules": ("c_attn",), "trainable_token_indices": {"wte": (3, 9)}},
    "saved": {"target_modules": ("c_attn",), "modules_to_save": ("wpe", "ln_f")},
    "all": {"target_modules": "all-linear"},
}
OTHERS = {
    "gemma3_embedding": Kind("gemma3", {"target_modules": ("embed_tokens", "v_proj")}),
    "gemma3_tokens": Kind("gemma3", {"target_modules": ("v_proj",), "trainable_token_indices": {"": (5, 3)}}),
    "qwen2_bias_all": Kind("qwen2", {"target_modules": ("q_proj", "o_proj"), "bias": "all"}),
    "qwen2_lora_bias": Kind("qwen2", {"target_modules": QKV, "lora_bias": True}),
    "gpt_neox_fused": Kind("gpt_neox", {"target_modules": ("query_key_value",), "bias": "all"}),
    "falcon_fused": Kind("falcon", {"target_modules": ("query_key_value", "dense")}),
    "phi3_fused": Kind("phi3", {"target_modules": ("qkv_proj", "gate_up_proj")}),
    "bert": Kind("bert", {"target_modules": ("query", "value")}),
    "bert_all": Kind("bert", {"target_modules": "all-linear"}),
    "classifier": Kind("classifier", {"target_modules": QKV}),
    "convolutions": Kind("convolutions", {"target_modules": ("wide", "narrow", "line")}),
    "convolutions_bias": Kind("convolutions", {"target_modules": ("wide", "line"), "bias": "lora_only"}),
    "convolutions_lora_bias": Kind("convolutions", {"target_modules": ("wide", "head"), "lora_bias": True}),
}
DORA = {"use_dora": True}
DORAS = {
    "dora": Kind("llama", {"target_modules": (*QKV, "down_proj"), **DORA}),
    "dora_dropout": Kind("llama", {"target_modules": QKV, "lora_dropout": 0.3, **DORA}),
    "dora_rank_stabilised": Kind(
        "llama", {"target_modules": QKV, "use_rslora": True, "rank_pattern": {"v_proj": 5}, **DORA}
    ),
    "dora_embedding": Kind("llama", {"target_modules": ("embed_tokens", "lm_head"), **DORA}),
    "dora_scaled_embedding": Kind("gemma3", {"target_modules": ("embed_tokens", "q_proj"), **DORA}),
    "dora_conv1d": Kind("gpt2", {**CONV1D, **DORA}),
    "dora_conv1d_bias": Kind("gpt2", {**CONV1D, "bias": "all", **DORA}),
    "dora_bias": Kind("qwen2", {"target_modules": QKV, "bias": "lora_only", **DORA}),
    "dora_convolutions": Kind("convolutions", {"target_modules": ("wide", "narrow", "line", "head"), **DORA}),
}
KINDS = {f"llama_{name}": Kind("llama", settings) for name, settings in LLAMA.items()}
KINDS |= {f"tied_{name}": Kind("tied", LLAMA[name]) for name in TIED}
KINDS |= {f"gpt2_{name}": Kind("gpt2", settings) for name, settings in GPT2.items()}
KINDS |= OTHERS
KINDS |= DORAS
