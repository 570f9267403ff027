"""Put adapted layers into a model, find them, turn them off, take them out again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.config import CLASSIFIER_HEADS, LoraConfig, match_targets
from lora_core.embeddings import TiedTokenOutputs, TokenOutputs, TokenRows
from lora_core.errors import BadConfig, UnknownTargetModules
from lora_core.experts import LoraExperts, parameter_layers
from lora_core.layer import AdapterLayer, LoraLayer
from lora_core.layers import LoraConv1D
from lora_core.query_value import is_fused, query_value_layer
from lora_core.targets import PAPER, PRESETS, matches, saving
from lora_core.variants import LORA, Kinds, kinds_for
from lora_core.whole import SavedModule, TrainedBias

LINEAR_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)


def layer_class(base_layer: nn.Module, kinds: Kinds = LORA) -> type[LoraLayer] | None:
    """What adapts a module of this kind, the most derived of those that fit; None if nothing does."""
    return next((kinds[kind] for kind in type(base_layer).__mro__ if kind in kinds), None)


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of the layers that "all-linear" means: all but the output layer, sorted."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    modules = model.named_modules()
    return sorted(name for name, module in modules if isinstance(module, LINEAR_KINDS) and module is not output)


def inject(
    model: nn.Module, config: LoraConfig, seed: int, *, on_layer: Callable[[], None] = lambda: None
) -> list[str]:
    """Freeze `model`, put in what `config` asks for, and return the paths of its LoRA layers, sorted.

    UnknownTargetModules if a name matches nothing; BadConfig if the model cannot be adapted as asked. Nothing is
    changed then. `on_layer` is called as each layer is made, some of which take seconds.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        layers = make_layers(model, config, seed, on_layer)
    except Exception:
        for parameter in trainable:
            parameter.requires_grad = True
        raise
    put_in(model, layers)
    return sorted(path for path, layer in layers.items() if isinstance(layer, (LoraLayer, LoraExperts)))


def put_in(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Freeze `model` but for what the layers train, and put them where they belong."""
    trained = [parameter for layer in layers.values() for parameter in _own_parameters(layer)]
    model.requires_grad_(requires_grad=False)
    for path, layer in layers.items():
        model.set_submodule(path, layer)
        layer.train(model.training)
    for parameter in trained:
        parameter.requires_grad = True


def make_layers(
    model: nn.Module, config: LoraConfig, seed: int | None, on_layer: Callable[[], None] = lambda: None
) -> dict[str, AdapterLayer]:
    """Path → the layer to put there, its base module frozen. Without a `seed` factors have no numbers yet."""
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise BadConfig("the model has adapted layers already; eject them first")
    modules: dict[str, Any] = dict(model.named_modules())
    layers: dict[str, AdapterLayer] = {**_lora_layers(model, modules, config, seed, on_layer)}
    for path in _saved(modules, config):
        layers[path] = SavedModule(modules[path], path=path)
    for path, layer in _token_layers(model, modules, config).items():
        if path in layers:
            raise BadConfig(f"trainable_token_indices names {path}, which is adapted or saved whole already")
        layers[path] = layer
    if config.bias == "all":
        for path, module in modules.items():
            taken = any(path == other or path.startswith(f"{other}.") for other in layers)
            if module._parameters.get("bias") is not None and not taken:
                layers[path] = TrainedBias(module, path=path)
    return layers


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


def _lora_layers(
    model: Any, modules: Mapping[str, nn.Module], config: LoraConfig, seed: int | None, on_layer: Callable[[], None]
) -> dict[str, AdapterLayer]:
    layers: dict[str, AdapterLayer] = {}
    kinds = kinds_for(config)
    for path in _targeted(model, modules, config):
        kind = layer_class(modules[path], kinds)
        if kind is None:
            raise BadConfig(f"{path}, a {type(modules[path]).__name__}, is adapted by LoRA, but not by this variant")
        if config.target_modules == PAPER and is_fused(path):
            if kinds is not LORA:
                raise BadConfig(f"queries and values of {path} are adapted apart by plain LoRA only; name the layer")
            layers[path] = query_value_layer(modules[path], path, config, seed, model.config)
        else:
            layers[path] = kind.from_config(modules[path], path, config, seed)
        on_layer()
    for path, layer in parameter_layers(modules, config, seed).items():
        if path in layers:
            raise BadConfig(f"{path} is in target_modules and has a parameter in target_parameters")
        layers[path] = layer
    if config.fan_in_fan_out and not any(isinstance(layer, LoraConv1D) for layer in layers.values()):
        raise BadConfig("fan_in_fan_out is for Conv1D layers, and no target is one")
    return layers


def _targeted(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> list[str]:
    paths = match_targets(
        config, (name for name, module in modules.items() if layer_class(module)), linear_layers(model)
    )
    for name, module in modules.items() if config.target_modules not in PRESETS else ():
        # PEFT, reading the same names, would fail on these
        named = any(matches(name, target) for target in config.target_modules)
        if named and not layer_class(module) and not saving(name, config.saved_names()):
            raise BadConfig(f"target_modules names {name}, a {type(module).__name__}, which is not adapted")
    if not paths and not config.target_parameters:
        raise BadConfig("no target_modules are left: all are excluded, saved whole or in other layers")
    return paths


def _saved(modules: Mapping[str, nn.Module], config: LoraConfig) -> list[str]:
    """Paths of the modules to train whole, of those within each other the outer."""
    found = [path for path in modules if any(matches(path, name) for name in config.saved_names())]
    either = CLASSIFIER_HEADS if config.task_type == "SEQ_CLS" else ()  # PEFT names both, and a model has one
    for name in config.modules_to_save:
        if name not in either and not any(matches(path, name) for path in found):
            available = sorted({path.rpartition(".")[2] for path in modules if path})
            raise UnknownTargetModules(
                f"modules_to_save names {name}, which the base model has not", unknown=[name], available=available
            )
    return [path for path in found if not any(path.startswith(f"{outer}.") for outer in found)]


def _token_layers(model: Any, modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, TokenRows]:
    """Layers for rows of embeddings. An output layer tied to an embedding shares its new rows, unless it has others:
    so it is in PEFT."""
    if not config.trainable_token_indices:
        return {}
    indices = {_embedding(model, modules, name): rows for name, rows in config.trainable_token_indices.items()}
    layers: dict[str, TokenRows] = {}
    for path, rows in indices.items():
        kind = TokenRows if isinstance(modules[path], nn.Embedding) else TokenOutputs
        if kind is TokenOutputs and not isinstance(modules[path], nn.Linear):
            raise BadConfig(f"trainable_token_indices names {path}, a {type(modules[path]).__name__}")
        layers[path] = kind(modules[path], path=path, indices=rows)
    source, tied = _tie(model, modules)
    if source in layers and tied and indices.get(tied, indices[source]) == indices[source]:
        layers[tied] = TiedTokenOutputs(modules[tied], path=tied, embedding=layers[source])
    return layers


def _embedding(model: Any, modules: Mapping[str, nn.Module], name: str) -> str:
    if not name:
        return _path_of(model.get_input_embeddings(), modules)
    found = [path for path in modules if matches(path, name)]
    if len(found) != 1:
        raise BadConfig(f"trainable_token_indices names {name}, and {len(found)} modules are called so")
    return found[0]


def _tie(model: Any, modules: Mapping[str, nn.Module]) -> tuple[str, str | None]:
    """The input embedding, and the output layer if it shares its matrix."""
    if not hasattr(model, "get_input_embeddings"):
        return "", None
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    shared = output is not None and output.weight is embedding.weight
    return _path_of(embedding, modules), _path_of(output, modules) if shared else None


def _path_of(module: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    return next(path for path, other in modules.items() if other is module)


def _own_parameters(layer: AdapterLayer) -> list[nn.Parameter]:
    """Those that the layer trains; the base's own are frozen."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]
