"""The check an adapter folder passes before it is published or merged. Reads two files; needs no torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from lora_core.adalora_config import AdaLoraConfig, read_config
from lora_core.adapter_names import WRAPPER, AdaptedModule, adapted_modules
from lora_core.changes import ModuleFactors, check_ranks, find_factors, is_announced, targeted_parameters, token_indices
from lora_core.config import MAX_CONFIG_BYTES, LoraConfig
from lora_core.errors import BadAdapter, BadConfig, KeyMismatch, NonFinite, ShapeMismatch
from lora_core.floats import Array, widen
from lora_core.header import ADAPTER_HEADER_BYTES, Header, TensorInfo, read_header
from lora_core.keymap import OUTPUT_LAYERS
from lora_core.peft_config import AdapterConfig
from lora_core.shards import ByteReader
from lora_core.targets import ends, matches, saved_module, saving

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter is: its configuration and, per module path, (out, r, in) of the product added there.

    `parameter_count` counts all that was trained, whole modules and rows included.
    """

    config: LoraConfig
    modules: Mapping[str, tuple[int, int, int]]
    parameter_count: int


def read_config_bytes(directory: Path) -> bytes:
    """The content of `adapter_config.json`, if it is not too large. A missing file is BadAdapter."""
    path = _file(directory, CONFIG_FILE)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise BadConfig(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
    return path.read_bytes()


def read_adapter_header(directory: Path) -> Header:
    """Header of `adapter_model.safetensors`. A missing file is BadAdapter."""
    return read_header(_file(directory, WEIGHTS_FILE), max_bytes=ADAPTER_HEADER_BYTES)


def read_factor(reader: ByteReader, header: Header, tensor: TensorInfo) -> Array:
    """One factor as float64. NaN and infinity are NonFinite."""
    raw = reader.read(header.data_start + tensor.begin, tensor.end - tensor.begin)
    values = widen(raw, tensor.dtype)
    if not np.isfinite(values).all():
        raise NonFinite(f"{tensor.name} holds NaN or infinity", tensor=tensor.name)
    return values.reshape(tensor.shape)


@dataclass(frozen=True)
class AdapterForm:
    """What config and header alone tell. `products` are the names of the factors of each module, `copies` tensors of
    the base's own."""

    facts: AdapterFacts
    header: Header
    products: Sequence[Sequence[str]]
    copies: frozenset[str]

    def check_learned(self, is_zero: Callable[[str], bool]) -> None:
        """BadAdapter if each product has a factor of zeros, and nothing else is there that may change the base."""
        if any(not any(map(is_zero, names)) for names in self.products):
            return
        no_change = {name for names in self.products for name in names} | self.copies
        if all(tensor.name in no_change or is_zero(tensor.name) for tensor in self.header.tensors):
            raise BadAdapter("every lora_B is zero, or all that it is multiplied by: this adapter changes nothing")


def check_adapter(directory: Path) -> AdapterFacts:
    """Read all of the adapter in `directory` and refuse what PEFT, vLLM or a merge could not use.

    Every tensor belongs to the configuration and is whole; beyond form, all numbers are finite, and something was
    learned: not every product is zero, or there is more than products.
    """
    form = inspect_adapter(directory)
    with ByteReader(directory / WEIGHTS_FILE) as reader:
        zero = {tensor.name for tensor in form.header.tensors if not read_factor(reader, form.header, tensor).any()}
    form.check_learned(zero.__contains__)
    return form.facts


def inspect_adapter(directory: Path) -> AdapterForm:
    """`check_adapter` without a look at the numbers: that every tensor belongs to the configuration and is whole."""
    data = read_config_bytes(directory)
    wide = AdapterConfig.from_json(data)
    header = read_adapter_header(directory)
    modules = adapted_modules(header)
    adapted = {_name(module): module for module in modules if module.roles.keys() - {"new_rows"}}
    config = read_config(data, modules=[*adapted])
    factors = {name: _check_factors(module, wide) for name, module in adapted.items()}
    if isinstance(config, AdaLoraConfig):
        _check_kept(config, factors)
    for module in modules:
        if new_rows := module.roles.get("new_rows"):
            token_indices(module.path, new_rows, wide)
    config = _as_names(config, modules, wide)
    named = [name for name, module in adapted.items() if not targeted_parameters(module.path, wide)]
    _check_targets(config, named, wide)
    for tensor in header.tensors:
        # AdaLoRA prunes modules to nothing; else sharded training saves what it failed to gather
        if 0 in tensor.shape and not wide.init_r:
            raise ShapeMismatch(f"{tensor.name} has shape {list(tensor.shape)}: it is empty")
    copies = frozenset(tensor.name for tensor in _copies_of_the_base(modules, wide))
    products = [[factor.name for factor in found.factors] for found in factors.values()]
    count = sum(prod(tensor.shape) for tensor in header.tensors if tensor.name not in copies)
    facts = AdapterFacts(config, {name: _sizes(found) for name, found in factors.items()}, count)
    return AdapterForm(facts, header, products, copies)


def _name(module: AdaptedModule) -> str:
    """Its path, and which of its parameters, if it is a module of experts."""
    return module.path + module.depth * WRAPPER


def _sizes(found: ModuleFactors) -> tuple[int, int, int]:
    out, *inputs = found.product
    return out, found.lora_A.shape[0], prod(inputs)


def _check_factors(module: AdaptedModule, config: AdapterConfig) -> ModuleFactors:
    found = find_factors(module, config)
    parameters = targeted_parameters(module.path, config)
    rows = found.lora_A.shape[0] if found.lora_A.shape else 0
    r, times = config.rank_for(module.path), 1
    if parameters:  # which of them it is, and how many experts there are, the base alone knows
        ranks = [config.rank_for(f"{module.path}.{name}") or 1 for name in parameters]
        r = next((rank for rank in ranks if rows % rank == 0), ranks[0])
        times = rows // r
    check_ranks(found.lora_A, found.lora_B, found.lora_E, r, times)
    if ("lora_bias" in module.roles) is not config.lora_bias:
        raise KeyMismatch(f"{module.path} and the config disagree on whether lora_B has a bias")
    return found


def _check_kept(config: AdaLoraConfig, factors: Mapping[str, ModuleFactors]) -> None:
    """Each module has the triplets that rank_pattern keeps, and all that it names are there."""
    if surplus := sorted(config.kept.keys() - factors.keys()):
        raise KeyMismatch(f"rank_pattern names {surplus[0]}, of which the file has no tensor")
    for path, found in factors.items():
        if found.lora_A.shape[0] != config.rank_for(path):
            r = config.rank_for(path)
            raise ShapeMismatch(f"{path} has rank {found.lora_A.shape[0]}; rank_pattern and init_r leave it {r}")


def _as_names(config: LoraConfig, modules: Iterable[AdaptedModule], wide: AdapterConfig) -> LoraConfig:
    """`config` with `modules_to_save` in names that mean, dot by dot, what PEFT took them for; and with the output
    layer named where PEFT adapted it because it is tied."""
    saved: set[str] = set()
    tied: set[str] = set()
    for module in modules:
        is_tied = wide.ensure_weight_tying and module.path.rpartition(".")[2] in OUTPUT_LAYERS
        if is_tied and module.roles.keys() - {"new_rows"}:
            tied.add(module.path)
        for name in module.saved:
            if (name == "bias" and config.bias == "all") or saving(module.path, config.saved_names()):
                continue
            if parent := saved_module(module.path, config.modules_to_save) or (module.path if is_tied else None):
                saved.add(parent)
    if tied and not isinstance(config.target_modules, str):
        config = replace(config, target_modules=(*config.target_modules, *tied))
    return replace(config, modules_to_save=(*config.modules_to_save, *saved)) if saved else config


def _check_targets(config: LoraConfig, paths: Iterable[str], wide: AdapterConfig) -> None:
    """Each module with factors is a target, and no target lacks factors, but for those that the config excludes."""
    paths = sorted(paths)
    if isinstance(config.target_modules, str):
        return
    for path in paths:
        if not any(matches(path, target) for target in config.target_modules):
            raise KeyMismatch(f"{path} has tensors but is not in target_modules")
    found = {end for path in paths for end in ends(path)}
    for target in config.target_modules:
        if target not in found and not wide.may_lack(target):
            raise KeyMismatch(f"target_modules names {target}, of which the file has no tensor")


def _copies_of_the_base(modules: Iterable[AdaptedModule], config: AdapterConfig) -> Iterable[TensorInfo]:
    for module in modules:
        yield from (tensor for name, tensor in module.saved_base.items() if name == "weight")
        yield from (tensor for name, tensor in module.saved.items() if not is_announced(module.path, name, config))


def _file(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise BadAdapter(f"the adapter lacks {name}")
    return path
