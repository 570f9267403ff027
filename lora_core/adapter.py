"""Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.adapter_names import PREFIX
from lora_core.config import LoraConfig, match_targets
from lora_core.errors import BadAdapter, KeyMismatch, ShapeMismatch
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE, AdapterForm, inspect_adapter
from lora_core.header import encode_header
from lora_core.inject import adapter_layers, lora_layers, make_layers, put_in
from lora_core.layer import AdapterLayer
from lora_core.layers import LoraConv1D
from lora_core.targets import PRESETS, matches, saved_module
from lora_core.tensors import FileTensors, is_zero
from lora_core.variants import as_saved

_COPY_OF_BASE = ".base_layer.weight"


def save_adapter(model: nn.Module, config: LoraConfig, directory: Path) -> None:
    """Write the adapted layers of `model` to `directory`. Equal adapters give equal bytes.

    Presets of target modules are written as the names they stood for, which every reader of the format understands.
    """
    tensors = adapter_tensors(model)
    head, header = encode_header(
        [(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()], {"format": "pt"}
    )
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / WEIGHTS_FILE).open("wb") as file:
        file.write(head)
        for info in header.tensors:
            file.write(tensors[info.name].detach().to("cpu", torch.float32).contiguous().numpy().data)
    (directory / CONFIG_FILE).write_bytes(export_config(model, config).to_peft_json())


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that an adapter file of `model` holds, by the names in the file."""
    layers = adapter_layers(model).items()
    return {
        f"{PREFIX}{path}.{name}": value for path, layer in layers for name, value in layer.adapter_tensors().items()
    }


def has_learned(model: nn.Module) -> bool:
    """Whether any adapted layer of `model` changes what the base computes."""
    return any(layer.has_learned() for layer in adapter_layers(model).values())


def export_config(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """`config` as PEFT must read it to find in the base what is adapted in `model`."""
    layers = lora_layers(model)
    config = as_saved(config, layers)
    every = sorted({path.replace(".base_layer", "") for path, _ in model.named_modules() if path})
    if config.target_modules in PRESETS:
        config = replace(config, target_modules=_spelt_out(config, list(layers), every))
    found = [name for name in config.saved_names() if any(matches(path, name) for path in every)]
    whole = [path for path in every if any(matches(path, name) for name in found)]
    if any(saved_module(path, found) not in (*whole, None) for path in every):
        found = whole
    config = replace(config, modules_to_save=tuple(found))
    return replace(config, fan_in_fan_out=_all_conv1d(layers.values()))


def load_adapter(model: nn.Module, directory: Path) -> LoraConfig:
    """Inject the adapter in `directory` into a model without adapted layers.

    Unknown, missing or misshapen tensors, NaN, and an adapter that changes nothing are errors; the model is then
    as it was.
    """
    form, layers, _ = read_layers(model, directory)
    put_in(model, layers)
    return form.facts.config


def read_layers(model: nn.Module, directory: Path) -> tuple[AdapterForm, dict[str, AdapterLayer], FileTensors]:
    """Path → the layer that does in `model` what the adapter in `directory` does there; none is put in.

    The file is read once, and its float32 factors are used where they lie.
    """
    form = inspect_adapter(directory)
    file = FileTensors(form.header)
    file.read(directory / WEIGHTS_FILE)
    tensors = file.tensors
    form.check_learned(lambda name: is_zero(tensors[name]))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        layers = make_layers(model, form.facts.config, seed=None)
        _fill(layers, tensors)
    except Exception:
        for parameter in trainable:
            parameter.requires_grad = True
        raise
    return form, layers, file


def _fill(layers: Mapping[str, AdapterLayer], tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of the file into the layer that it is named after, and none left over."""
    left = {name.replace("magnitude_vector.weight", "magnitude_vector"): tensor for name, tensor in tensors.items()}
    for path, layer in layers.items():
        names = {f"{PREFIX}{path}.{name}": name for name in layer.adapter_tensors()}
        if missing := sorted(names.keys() - left.keys()):
            raise KeyMismatch(f"the file has no tensor {missing[0]}", missing=missing)
        layer.load_tensors({short: left.pop(name) for name, short in names.items()})
    for name, tensor in sorted(left.items()):
        path = name.removeprefix(PREFIX).removesuffix(_COPY_OF_BASE)
        if path not in layers or not name.endswith(_COPY_OF_BASE):
            raise KeyMismatch(f"{name} has no place in the base model as the config adapts it", missing=[name])
        _compare(name, tensor, layers[path].base_layer.weight)


def _compare(name: str, copy: Tensor, weight: Tensor) -> None:
    """The base's own matrix, which PEFT stores with an adapter of input or output layer, is that of this base."""
    if copy.shape != weight.shape:
        raise ShapeMismatch(f"{name} is {list(copy.shape)}, and the base's is {list(weight.shape)}: resize it first")
    if not torch.equal(copy.to(weight), weight):
        raise BadAdapter(f"{name} is not the base's matrix: the adapter was trained on another base")


def _spelt_out(config: LoraConfig, adapted: list[str], every: list[str]) -> tuple[str, ...]:
    """The last names of the adapted modules, or their whole paths should a last name match any other module."""
    suffixes = tuple(sorted({path.rpartition(".")[2] for path in adapted}))
    same = match_targets(replace(config, target_modules=suffixes), every) == sorted(adapted)
    return suffixes if same else tuple(sorted(adapted))


def _all_conv1d(layers: Iterable[AdapterLayer]) -> bool:
    found = [isinstance(layer, LoraConv1D) for layer in layers]
    return bool(found) and all(found)
