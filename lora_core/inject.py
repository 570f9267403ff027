"""Put LoRA layers into a model, find them, turn them off, take them out again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_core.config import OUTPUT_LAYER, LoraConfig, match_targets
from lora_core.errors import BadConfig
from lora_core.layer import AdapterLayer, LoraLayer
from lora_core.layers import LoraLinear

# Kind of base module → the layer that adapts it; of several kinds that fit, the most derived counts.
LAYER_KINDS: dict[type[nn.Module], type[LoraLayer]] = {nn.Linear: LoraLinear}


def layer_class(base_layer: nn.Module) -> type[LoraLayer] | None:
    """What adapts a module of this kind; None if nothing does."""
    return next((LAYER_KINDS[kind] for kind in type(base_layer).__mro__ if kind in LAYER_KINDS), None)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Path → every linear layer, the output layer included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def inject(model: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Freeze `model`, wrap its target modules, and return their paths, sorted.

    UnknownTargetModules if a target does not exist; BadConfig if the model cannot be adapted as asked. Nothing is
    changed then.
    """
    if lora_layers(model):
        raise BadConfig("the model has LoRA layers already; eject them first")
    if config.fan_in_fan_out:
        raise BadConfig("fan_in_fan_out is for Conv1D layers; no model trained here has them")
    layers = linear_layers(model)
    paths = match_targets(config, layers)
    model_config = getattr(model, "config", None)
    if OUTPUT_LAYER in paths and getattr(model_config, "tie_word_embeddings", False):
        raise BadConfig(f"{OUTPUT_LAYER} shares its weight with the input embedding and cannot be a target")
    model.requires_grad_(requires_grad=False)
    for path in paths:
        kind = layer_class(layers[path])
        if kind is None:
            raise BadConfig(f"{path} is of a kind that no layer here adapts")
        model.set_submodule(path, kind.from_config(layers[path], path, config, seed))
    return paths


def eject(model: nn.Module) -> None:
    """Take every adapted layer out: the model is the frozen base again, ready for another adapter."""
    for path, layer in adapter_layers(model).items():
        model.set_submodule(path, layer.base_layer)


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The model computes what its base computes, bit for bit, until the block ends."""
    layers = [layer for layer in adapter_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Path → every adapted module, those with whole parameters or rows of their own included, sorted."""
    return {name: module for name, module in sorted(model.named_modules()) if isinstance(module, AdapterLayer)}


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Path → every LoRA layer, sorted."""
    return {name: module for name, module in adapter_layers(model).items() if isinstance(module, LoraLayer)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A and lora_B of every LoRA layer, in the order of paths."""
    return [factor for layer in lora_layers(model).values() for factor in (layer.lora_A, layer.lora_B)]
