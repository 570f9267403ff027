"""Llama checkpoints and LoRA adapters of any size, of seeded random numbers, written without a model in memory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_core.config import LoraConfig
from lora_core.header import encode_header

HIDDEN, INTERMEDIATE, KEY_VALUE = 2048, 5632, 256
SHARD_BYTES = 500_000_000
R = 16

Shape = tuple[int, ...]


def linear_shapes() -> dict[str, Shape]:
    """The linear layers of one block, (out, in)."""
    return {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj": (KEY_VALUE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }


def write_base(directory: Path, *, layers: int, vocab: int) -> Path:
    """A bfloat16 Llama in shards of 500 MB: config.json, weights, index."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Shape]] = [{}]
    room = SHARD_BYTES
    for name, shape in _tensors(layers, vocab).items():
        size = 2 * math.prod(shape)
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shapes in zip(names, shards, strict=True):
        _write(directory / name, shapes, "BF16", scale=0.02)
    weight_map = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
    total = sum(2 * math.prod(shape) for shapes in shards for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_adapter(directory: Path, *, layers: int, alpha: int = 2 * R) -> Path:
    """An r = 16 adapter in float32 on every linear layer of every block; the numbers are always the same."""
    directory.mkdir(parents=True)
    modules = linear_shapes()
    targets = tuple(sorted(name.rpartition(".")[2] for name in modules))
    config = LoraConfig(r=R, lora_alpha=alpha, target_modules=targets)
    (directory / "adapter_config.json").write_bytes(config.to_peft_json())
    shapes: dict[str, Shape] = {}
    for layer in range(layers):
        for module, (rows, columns) in modules.items():
            path = f"base_model.model.model.layers.{layer}.{module}"
            shapes |= {f"{path}.lora_A.weight": (R, columns), f"{path}.lora_B.weight": (rows, R)}
    _write(directory / "adapter_model.safetensors", shapes, "F32", scale=0.02)
    return directory


def _tensors(layers: int, vocab: int) -> dict[str, Shape]:
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": shape for name, shape in linear_shapes().items()}
        tensors |= {f"{prefix}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return tensors | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocab, HIDDEN)}


def _write(path: Path, shapes: Mapping[str, Shape], dtype: str, *, scale: float) -> None:
    """The same sixteen million normal numbers over and over, from another place for each tensor."""
    head, header = encode_header([(name, dtype, shape) for name, shape in shapes.items()], {"format": "pt"})
    numbers = np.random.default_rng(0).normal(0, scale, 2**24).astype(np.float32)
    raw = numbers.view(np.uint8) if dtype == "F32" else (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    with path.open("wb") as file:
        file.write(head)
        for number, tensor in enumerate(header.tensors):
            left, begin = tensor.end - tensor.begin, 4 * (number * 7919 % 10_000)
            while left:
                left -= file.write(raw[begin : begin + left].data)
                begin = 0
