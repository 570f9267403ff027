"""A model of random numbers in memory, two sides of it, and adapters for it on disk: for benchmarks of live models."""

import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core.adapter import save_adapter
from lora_core.config import LoraConfig
from lora_core.inject import eject, inject, lora_layers

R = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(layers: int, dtype: str) -> Any:
    """A Llama with the widths of Qwen2.5-0.5B and a vocabulary of 32 000; 24 layers are 0.39 billion parameters."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()


def second(model: Any) -> Any:
    """The same model once more, for the peer."""
    return copy.deepcopy(model)


def write_adapters(model: Any, folder: Path, count: int) -> list[Path]:
    """Adapters of rank 16 on every linear layer, float32, with random lora_B."""
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=TARGETS)
    directories = []
    for number in range(count):
        inject(model, config, seed=number)
        generator = torch.Generator().manual_seed(number)
        for layer in lora_layers(model).values():
            layer.lora_B.data.normal_(0.0, 0.02, generator=generator)
        directories.append(folder / f"adapter{number}")
        save_adapter(model, config, directories[-1])
        eject(model)
    return directories


def seconds(action: Callable[[], object], times: int = 1) -> float:
    """What one of `times` calls takes."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        for _ in range(times):
            action()
        return (time.perf_counter() - began) / times
