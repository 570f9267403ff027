"""Whether a base model has what a job's LoRA settings name: said at submit, not after an hour in a queue."""

from collections.abc import Iterable, Mapping

from lora_core import errors as lora_errors
from lora_core.adalora_config import AdaLoraConfig
from lora_core.architectures import ARCHITECTURES
from lora_core.config import CHANGE_THE_START, LoraConfig, match_targets
from lora_core.keymap import OUTPUT_LAYERS, is_conv1d
from lora_core.nf4 import BLOCK
from lora_core.targets import FUSED, OUTPUT_LAYER, PAPER, ends, matches, names_of
from registry.errors import InvalidHyperparameter, UnknownTargetModules
from registry.jobs.spec import LoraSpec
from registry.models import BaseModel


def check_lora(lora: LoraSpec, base_model: BaseModel) -> None:
    """UnknownTargetModules naming what exists, or InvalidHyperparameter for what does not fit the base model."""
    shapes: dict[str, list[int]] = base_model.facts["linear_modules"]
    family = ARCHITECTURES[base_model.architecture]
    # a tied output layer has no tensor, and an embedding is no linear layer, but a model has both
    modules = sorted({*shapes, f"{family.trunk or 'model.'}{family.embedding}", OUTPUT_LAYER})
    config = lora.config()
    targets = _targets(config, modules, shapes)
    experts = _experts(config, base_model.facts.get("expert_parameters", {}))
    for name in ("exclude_modules", "modules_to_save"):
        _check_names(name, getattr(config, name), modules)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(name, getattr(config, name), [*targets, *experts])
    _check_ranks(config, [*targets, *experts], shapes | {path: shape[1:] for path, shape in experts.items()})
    _check_together(lora, config, targets, family.embedding)
    if lora.quantization:
        _check_quantised(lora, base_model.architecture, shapes)
    vocabulary = base_model.facts["vocab_size"]
    if large := [token for token in lora.trainable_token_indices if token >= vocabulary]:
        raise InvalidHyperparameter(
            f"The base model has {vocabulary} tokens, none of them {large[0]}.", param="lora.trainable_token_indices"
        )


def _targets(config: LoraConfig, modules: list[str], shapes: Mapping[str, list[int]]) -> list[str]:
    try:
        targets = match_targets(config, modules, [path for path in shapes if not matches(path, OUTPUT_LAYER)])
    except lora_errors.UnknownTargetModules as error:
        raise UnknownTargetModules(error.message, param="lora.target_modules", **error.details) from None
    if not targets and not config.target_parameters:
        raise InvalidHyperparameter(
            "No module is left to adapt: all targets are excluded, saved whole, or outside `layers_to_transform`.",
            param="lora.target_modules",
        )
    return targets


def _experts(config: LoraConfig, parameters: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Path → (experts, out, in) of the parameters that are adapted."""
    existing = {end for path in parameters for end in ends(path)}
    if unknown := [name for name in config.target_parameters if name not in existing]:
        available = sorted({".".join(path.split(".")[-3:]) for path in parameters})
        raise UnknownTargetModules(
            f"the base model has no parameter of experts named {', '.join(unknown)}; it has "
            f"{', '.join(available) or 'none'}",
            param="lora.target_parameters",
            unknown=unknown,
            available=available,
        )
    wanted = set(config.target_parameters)
    return {path: shape for path, shape in parameters.items() if not wanted.isdisjoint(ends(path))}


def _check_names(field: str, names: Iterable[str], modules: Iterable[str]) -> None:
    existing = {name for path in modules for name in names_of(path)}
    unknown = [name for name in names if name not in existing]
    if unknown:
        available = sorted({path.rpartition(".")[2] for path in modules})
        raise UnknownTargetModules(
            f"the base model has no module named {', '.join(unknown)}; it has {', '.join(available)}",
            param=f"lora.{field}",
            unknown=unknown,
            available=available,
        )


def _check_patterns(field: str, pattern: Mapping[str, float], targets: Iterable[str]) -> None:
    existing = {end for path in targets for end in ends(path)}
    for name in pattern:
        if name not in existing:
            raise InvalidHyperparameter(f"`{name}` is not one of the adapted modules.", param=f"lora.{field}")


def _check_ranks(config: LoraConfig, targets: Iterable[str], shapes: Mapping[str, list[int]]) -> None:
    for path in targets:
        r, limit = config.rank_for(path), min(shapes.get(path, [config.r]))
        if r > limit:
            field = "adalora" if isinstance(config, AdaLoraConfig) else "r" if r == config.r else "rank_pattern"
            raise InvalidHyperparameter(
                f"r = {r} is larger than the smaller dimension of {path}, {limit}.", param=f"lora.{field}", limit=limit
            )


def _check_together(lora: LoraSpec, config: LoraConfig, targets: Iterable[str], embedding: str) -> None:
    """What each is possible alone, and not with the other."""
    is_target = any(matches(path, embedding) for path in targets)
    is_saved = any(matches(name, embedding) for name in config.modules_to_save)
    if lora.trainable_token_indices and (is_target or is_saved):
        raise InvalidHyperparameter(
            f"{embedding} is adapted or saved whole already; leave it out there, or train no rows of it.",
            param="lora.trainable_token_indices",
        )
    starts_from_base = lora.init_lora_weights in CHANGE_THE_START
    if (starts_from_base or lora.adalora) and is_target:
        name, field = ("AdaLoRA", "adalora") if lora.adalora else (lora.init_lora_weights, "init_lora_weights")
        raise InvalidHyperparameter(f"{name} is for linear layers, and {embedding} is none.", param=f"lora.{field}")
    fused = [path for path in targets if path.rpartition(".")[2] in FUSED]
    if lora.target_modules == PAPER and fused and (lora.use_dora or starts_from_base or lora.adalora):
        raise InvalidHyperparameter(
            f"Queries and values inside {fused[0]} are adapted by plain LoRA only. Name the layer instead of `paper`.",
            param="lora.target_modules",
        )


def quantised_layers(family: str, linear: Iterable[str]) -> list[str]:
    """Of the linear layers of a base of this family those that QLoRA keeps in 4 bits."""
    names = ((path, path.rpartition(".")[2]) for path in linear)
    return [path for path, name in names if name not in OUTPUT_LAYERS and not is_conv1d(family, name)]


def _check_quantised(lora: LoraSpec, family: str, shapes: Mapping[str, list[int]]) -> None:
    """That there are layers to keep in 4 bits, in whole blocks, and none of them is trained whole."""
    layers = quantised_layers(family, shapes)
    if not layers:
        raise InvalidHyperparameter(
            f"{family} models have no linear layers that could be kept in 4 bits. Leave `quantization` out.",
            param="lora.quantization",
        )
    if uneven := [path for path in layers if shapes[path][1] % BLOCK]:
        raise InvalidHyperparameter(
            f"{uneven[0]} has {shapes[uneven[0]][1]} inputs, and 4-bit numbers come in blocks of {BLOCK}. "
            "Leave `quantization` out.",
            param="lora.quantization",
        )
    saved = set(lora.modules_to_save)
    if whole := [path for path in layers if not saved.isdisjoint(names_of(path))]:
        raise InvalidHyperparameter(
            f"{whole[0]} is kept in 4 bits and cannot be trained whole. Leave it out of `modules_to_save`.",
            param="lora.modules_to_save",
        )
