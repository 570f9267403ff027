"""Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.config import ALL_LINEAR, LoraConfig, match_targets
from lora_core.errors import KeyMismatch, ShapeMismatch
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE, adapter_pairs, check_adapter, read_adapter_header, read_factor
from lora_core.header import encode_header
from lora_core.inject import adapter_layers, inject, linear_layers, lora_layers
from lora_core.shards import ByteReader


def save_adapter(model: nn.Module, config: LoraConfig, directory: Path) -> None:
    """Write the LoRA layers of `model` to `directory`. Equal adapters give equal bytes.

    "all-linear" is written as the list of names it stood for, which every reader of the format understands.
    """
    layers = lora_layers(model)
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter_layers(model).items():
        tensors |= {f"base_model.model.{path}.{name}": tensor for name, tensor in layer.adapter_tensors().items()}
    head, header = encode_header(
        [(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()], {"format": "pt"}
    )
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / WEIGHTS_FILE).open("wb") as file:
        file.write(head)
        for info in header.tensors:
            file.write(tensors[info.name].detach().to("cpu", torch.float32).contiguous().numpy().data)
    if config.target_modules == ALL_LINEAR:
        config = replace(config, target_modules=_spelt_out(list(layers), _all_linear_paths(model)))
    (directory / CONFIG_FILE).write_bytes(config.to_peft_json())


def load_adapter(model: nn.Module, directory: Path) -> LoraConfig:
    """Inject the adapter in `directory` into a model without LoRA layers.

    Unknown, missing or misshapen tensors, NaN, and an adapter that changes nothing are errors; the model is then
    as it was.
    """
    facts = check_adapter(directory)
    base = linear_layers(model)
    expected = set(match_targets(facts.config, base))
    if wrong := sorted(expected ^ facts.modules.keys()):
        kind = "the file has no tensor for" if wrong[0] in expected else "the base model has no linear module"
        raise KeyMismatch(f"{kind} {wrong[0]}")
    for path, (rows, _, columns) in facts.modules.items():
        if tuple(base[path].weight.shape) != (rows, columns):
            raise ShapeMismatch(f"{path} is {list(base[path].weight.shape)}, the adapter is for {[rows, columns]}")
    inject(model, facts.config, seed=0)
    header = read_adapter_header(directory)
    layers = adapter_layers(model)
    with ByteReader(directory / WEIGHTS_FILE) as reader:
        for path, pair in adapter_pairs(header, facts.config).items():
            factors = {"lora_A.weight": pair.lora_A, "lora_B.weight": pair.lora_B}
            read = {name: read_factor(reader, header, info) for name, info in factors.items()}
            layers[path].load_tensors({name: torch.from_numpy(values) for name, values in read.items()})
    return facts.config


def _all_linear_paths(model: nn.Module) -> list[str]:
    return [path.removesuffix(".base_layer") for path in linear_layers(model)]


def _spelt_out(adapted: list[str], linear: list[str]) -> tuple[str, ...]:
    """The last names of the adapted modules, or their whole paths should a last name match any other module."""
    suffixes = tuple(sorted({path.rpartition(".")[2] for path in adapted}))
    same = match_targets(LoraConfig(target_modules=suffixes), linear) == sorted(adapted)
    return suffixes if same else tuple(sorted(adapted))
