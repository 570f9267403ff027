"""Put LoRA layers into a model, find them, take them out again."""

from torch import nn

from lora_core.config import OUTPUT_LAYER, LoraConfig, match_targets
from lora_core.errors import BadConfig
from lora_core.layers import LoraLinear


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
        wrapped = LoraLinear(
            layers[path],
            path=path,
            r=config.rank_for(path),
            scaling=config.scaling_for(path),
            lora_dropout=config.lora_dropout,
            gaussian=config.init_lora_weights == "gaussian",
            seed=seed,
        )
        model.set_submodule(path, wrapped)
    return paths


def eject(model: nn.Module) -> None:
    """Take every LoRA layer out: the model is the frozen base again, ready for another adapter."""
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.base_layer)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Path → every LoRA layer, sorted."""
    return {name: module for name, module in sorted(model.named_modules()) if isinstance(module, LoraLinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A and lora_B of every LoRA layer, in the order of paths."""
    return [factor for layer in lora_layers(model).values() for factor in (layer.lora_A, layer.lora_B)]
