"""The key map of a base, from transformers itself: how it names parameters, and how it makes them of a checkpoint."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from lora_core.architectures import ARCHITECTURES
from lora_core.errors import BadBase
from lora_core.header import TensorInfo
from lora_core.keymap import Keymap, Place

Shape = tuple[int, ...]


def build_keymap(base_config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Keymap:
    """Where each parameter of the model that `base_config` (config.json) describes lies in a checkpoint of `tensors`.

    The model is made without memory for its numbers. A tensor that the model does not know is BadBase, and so is a
    parameter without one. Parameters made in a way that cannot be followed are `opaque`.
    """
    model = _empty_model(base_config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict(keep_vars=True).items()}
    tied = dict(model.all_tied_weights_keys)
    places: dict[str, tuple[Place, ...]] = {}
    opaque: dict[str, str] = {}
    for parameter, (converter, sources) in _sources(model, shapes, tensors).items():
        if converter is None:
            places[parameter] = (Place(tensor=sources[0][1]),)
        elif (found := _converted(parameter, converter, sources, shapes, tensors)) is None:
            opaque |= dict.fromkeys(_targets(parameter, converter), repr(converter.operations))
        else:
            places |= found
    _check(shapes, tensors, places, opaque, tied)
    return Keymap(
        places={name: places[name] for name in shapes if name in places},
        shapes=shapes,
        conv1d=frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
        tied=tied,
        new_names={name: name for name in tied if name not in places and _is_own_name(model, name, shapes)},
        opaque=opaque,
        experts=_experts(model),
        linear=_linear(model),
    )


def _empty_model(base_config: Mapping[str, Any]) -> Any:
    given = {name: value for name, value in base_config.items() if name != "model_type"}
    family = ARCHITECTURES.get(str(base_config.get("model_type")))
    maker: Any = AutoModelForSeq2SeqLM if family and family.kind == "encoder-decoder" else AutoModelForCausalLM
    try:
        config = AutoConfig.for_model(str(base_config.get("model_type")), **given)
        with torch.device("meta"):
            return maker.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise BadBase(f"transformers cannot make a model of this config.json: {str(error)[:200]}") from None


def _sources(
    model: Any, shapes: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]
) -> dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]]:
    """Parameter → how it is made, and its (pattern, checkpoint tensor)s in the order in which transformers takes them.

    Of several parameters that are made together, the first stands for all. Tensors unknown to the model are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": shapes}
    result: dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, **prefix)
        if parameter not in shapes and name in shapes:
            parameter, pattern = rename_source_key(name, [], [], **prefix)
        if parameter in shapes:
            entry = result.setdefault(parameter, (by_pattern[pattern] if pattern else None, []))
            entry[1].append((pattern or "", name))
    return result


def _converted(
    parameter: str,
    converter: WeightConverter,
    sources: list[tuple[str, str]],
    shapes: Mapping[str, Shape],
    tensors: Mapping[str, TensorInfo],
) -> dict[str, tuple[Place, ...]] | None:
    """Places of the parameters that one conversion makes, or None if it does more than stack, join, cut or turn."""
    order = {pattern: position for position, pattern in enumerate(converter.source_patterns)}
    sources = sorted(sources, key=lambda source: order[source[0]])  # stable: within a pattern, as they were taken
    names = [name for _, name in sources]
    targets = _targets(parameter, converter)
    match [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]:
        case [(kind, 0)] if kind is MergeModulelist and len(targets) == 1:
            places = [Place(tensor=name, expert=expert) for expert, name in enumerate(names)]
        case [(first, 0), (second, 1)] if (first, second) == (MergeModulelist, Concatenate):
            places = _stacked_and_joined(sources, tensors)
        case [(kind, 0)] if kind is Concatenate:
            places = _joined(names, tensors)
        case [(kind, 0)] if kind in (Chunk, Split) and len(names) == 1 and len(targets) > 1:
            return _cut(targets, names[0], shapes, tensors)
        case [(kind, _)] if kind is Transpose and len(shapes[parameter]) == 2:
            checks_shape = getattr(converter.operations[0], "check_dims", False)
            turned = not checks_shape or tensors[names[0]].shape != shapes[parameter]
            places = [Place(tensor=names[0], transposed=turned)]
        case _:
            return None
    return {parameter: tuple(places)}


def _stacked_and_joined(sources: list[tuple[str, str]], tensors: Mapping[str, TensorInfo]) -> list[Place]:
    """A matrix per expert and kind: the kinds of one expert lie below each other."""
    places, begin = [], 0
    for _, group in groupby(sources, key=lambda source: source[0]):
        names = [name for _, name in group]
        end = begin + tensors[names[0]].shape[0]
        places += [Place(tensor=name, expert=expert, rows=(begin, end)) for expert, name in enumerate(names)]
        begin = end
    return places


def _joined(names: list[str], tensors: Mapping[str, TensorInfo]) -> list[Place]:
    places, begin = [], 0
    for name in names:
        end = begin + tensors[name].shape[0]
        places.append(Place(tensor=name, rows=(begin, end)))
        begin = end
    return places


def _cut(
    targets: list[str], name: str, shapes: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]
) -> dict[str, tuple[Place, ...]] | None:
    """Parameters that lie below each other in one tensor."""
    places: dict[str, tuple[Place, ...]] = {}
    first = 0
    for target in targets:
        rows = shapes[target][0]
        places[target] = (Place(tensor=name, rows=(0, rows), first=first),)
        first += rows
    return places if first == tensors[name].shape[0] else None


def _targets(parameter: str, converter: WeightConverter) -> list[str]:
    """All parameters that a conversion makes; it is known by the name of the first."""
    before, first, after = parameter.partition(converter.target_patterns[0])
    return [before + target + after for target in converter.target_patterns] if first else [parameter]


def _check(
    shapes: Mapping[str, Shape],
    tensors: Mapping[str, TensorInfo],
    places: Mapping[str, tuple[Place, ...]],
    opaque: Mapping[str, str],
    tied: Mapping[str, str],
) -> None:
    for parameter in shapes:
        if parameter not in places and parameter not in opaque and parameter not in tied:
            raise BadBase(f"the checkpoint has nothing for {parameter}")
        whole = [tensors[place.tensor] for place in places.get(parameter, ()) if place.is_whole]
        if whole and whole[0].shape != shapes[parameter]:
            found, wanted = list(whole[0].shape), list(shapes[parameter])
            raise BadBase(f"{whole[0].name} has shape {found}, the model of config.json {wanted}")


def _is_own_name(model: Any, name: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether transformers would take a tensor called like the parameter for the parameter."""
    tensor = TensorInfo(name, "F32", shapes[name], 0, 0)
    return name in _sources(model, shapes, {name: tensor})


def _experts(model: Any) -> dict[str, bool]:
    """Modules that own a three-dimensional parameter, and whether its matrices are (in, out)."""
    return {
        name: bool(getattr(module, "is_transposed", False))
        for name, module in model.named_modules()
        if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    }


def _linear(model: Any) -> frozenset[str]:
    """Weights that bitsandbytes would store in 4 bits: of linear layers, except the output layer."""
    output = model.get_output_embeddings()
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output
    )
