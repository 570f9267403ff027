"""An adapter as its factors: what the algebra of adapters reads and writes, folder by folder, without torch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lora_core import strict_json
from lora_core.adapter_names import AdaptedModule, adapted_modules, require
from lora_core.changes import check_ranks
from lora_core.config import LoraConfig
from lora_core.errors import BadAdapter, BadConfig, KeyMismatch, NonFinite
from lora_core.floats import Array
from lora_core.gate import CONFIG_FILE, WEIGHTS_FILE, read_adapter_header, read_config_bytes, read_factor
from lora_core.header import TensorInfo, encode_header
from lora_core.peft_config import AdapterConfig
from lora_core.shards import ByteReader, staged_directory

Shape = tuple[int, ...]
_LINEAR = ("lora_A", "lora_B")
_EMBEDDING = ("embedding_A", "embedding_B")
# Settings that let an adapter spare modules which its targets name.
_SPARE_MODULES = ("exclude_modules", "layers_pattern", "layers_to_transform")


@dataclass(frozen=True)
class Factors:
    """scaling · lora_B · lora_A of one module, as matrices (out, r) and (r, in) in float64.

    `inputs` is the shape of an input: (in,), or (in, height, width) of a convolution.
    """

    lora_A: Array
    lora_B: Array
    scaling: float
    inputs: Shape
    embedding: bool = False

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def place(self) -> tuple[int, Shape, bool]:
        """What two modules must share for their products to be added."""
        return self.lora_B.shape[0], self.inputs, self.embedding

    def with_factors(self, lora_B: Array, lora_A: Array) -> "Factors":
        """Other factors in the same place, with scaling 1."""
        return replace(self, lora_A=lora_A, lora_B=lora_B, scaling=1.0)


@dataclass(frozen=True)
class About:
    """What an adapter's configuration says besides ranks. `targets` is None where they do not tell all modules."""

    base_model: str | None
    revision: str | None
    task_type: str | None
    fan_in_fan_out: bool
    targets: frozenset[str] | None


class FactorFile:
    """An open adapter folder: `paths` are its modules, `copies` the base's own tensors stored with it.

    Only factors can be computed with: DoRA, biases, whole modules, new token rows and parameters of experts are
    BadAdapter. AdaLoRA becomes a plain LoRA.
    """

    def __init__(self, directory: Path) -> None:
        data = read_config_bytes(directory)
        self._config = AdapterConfig.from_json(data)
        self.about = _about(strict_json.loads(data), self._config)
        self._header = read_adapter_header(directory)
        self._modules: dict[str, AdaptedModule] = {}
        self.copies: dict[str, TensorInfo] = {}
        for module in adapted_modules(self._header):
            self._admit(module)
        self.paths = sorted(self._modules)
        if not self.paths:
            raise BadAdapter("the adapter has no module of rank above 0")
        self._reader = ByteReader(directory / WEIGHTS_FILE)

    def _admit(self, module: AdaptedModule) -> None:
        if self._config.target_parameters:
            raise BadAdapter("the adapter has target_parameters; the factors of experts cannot be computed with here")
        if self._config.ensure_weight_tying:
            raise BadAdapter("the adapter sets ensure_weight_tying; tied layers cannot be computed with here")
        if module.saved or "bias" in module.saved_base:
            name = next(iter(module.saved), "bias")
            raise BadAdapter(f"{module.path}.{name} is stored whole; only factors can be computed with here")
        for tensor in module.saved_base.values():
            self.copies[tensor.name] = tensor
        if strange := sorted(module.roles.keys() - {*_LINEAR, *_EMBEDDING, "lora_E"}):
            name = module.roles[strange[0]].name
            raise BadAdapter(f"{name} is more than a factor; only plain LoRA can be computed with here")
        if not module.roles:
            return
        names = _names(module)
        roles = require(module, *names, *(["lora_E"] if self._config.init_r else []))
        lora_A, lora_B = (roles[name] for name in names)
        check_ranks(lora_A, lora_B, roles.get("lora_E"), self._config.rank_for(module.path), 1)
        if len(roles) != (3 if self._config.init_r else 2):
            raise KeyMismatch(f"{module.path} has tensors that do not belong to an adapter of this configuration")
        if 0 not in lora_A.shape:  # AdaLoRA can prune all of a module's rank
            self._modules[module.path] = module

    def read(self, path: str) -> Factors:
        """The factors of one module. NaN and infinity are NonFinite."""
        module = self._modules[path]
        names = _names(module)
        lora_A, lora_B = (read_factor(self._reader, self._header, module.roles[name]) for name in names)
        inputs = lora_A.shape[1:]
        lora_A = lora_A.reshape(len(lora_A), -1)
        if lora_E := module.roles.get("lora_E"):
            lora_A = lora_A * read_factor(self._reader, self._header, lora_E).reshape(-1, 1)
        lora_B = lora_B.reshape(len(lora_B), -1)
        return Factors(lora_A, lora_B, self._config.scaling_for(path), inputs, names is _EMBEDDING)

    def read_copy(self, name: str) -> Array:
        """The bytes of one of `copies`."""
        tensor = self.copies[name]
        return self._reader.read(self._header.data_start + tensor.begin, tensor.end - tensor.begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._reader.close()


def write_factors(
    directory: Path,
    modules: Mapping[str, Factors],
    about: About,
    copies: Mapping[str, tuple[TensorInfo, Array]] | None = None,
) -> None:
    """Write an adapter in PEFT's format, factors in float32, to a folder that must not exist. Equal adapters give
    equal bytes. One that changes nothing is BadAdapter.

    Each module keeps its rank and scaling: the commonest become `r` and `lora_alpha`, the others go into patterns.
    """
    if not any(factors.lora_A.any() and factors.lora_B.any() and factors.scaling for factors in modules.values()):
        raise BadAdapter("the result changes nothing: every product is zero")
    config = _config(modules, about)
    tensors: dict[str, tuple[str, Shape, Array]] = {}
    for path, factors in modules.items():
        tensors |= {name: ("F32", shape, values) for name, shape, values in _tensors(path, factors)}
    for name, (info, raw) in (copies or {}).items():
        tensors[name] = info.dtype, info.shape, raw
    head, header = encode_header(
        ((name, dtype, shape) for name, (dtype, shape, _) in tensors.items()), {"format": "pt"}
    )
    with staged_directory(directory) as stage:
        with (stage / WEIGHTS_FILE).open("wb") as file:
            file.write(head)
            for info in header.tensors:
                values = tensors[info.name][2]
                file.write((values if values.dtype == np.uint8 else _float32(info.name, values)).data)
        (stage / CONFIG_FILE).write_bytes(config.to_peft_json())


def _about(document: Mapping[str, Any], config: AdapterConfig) -> About:
    for name in ("base_model_name_or_path", "revision", "task_type"):
        if not isinstance(document.get(name), str | None):
            raise BadConfig(f"{name} must be text or null")
    spares = any(document.get(name) is not None for name in _SPARE_MODULES)
    return About(
        base_model=document.get("base_model_name_or_path") or None,
        revision=document.get("revision") or None,
        task_type=document.get("task_type"),
        fan_in_fan_out=config.fan_in_fan_out,
        targets=None if spares or config.target_modules is None or config.init_r else frozenset(config.target_modules),
    )


def _names(module: AdaptedModule) -> tuple[str, str]:
    return _EMBEDDING if module.roles.keys() & set(_EMBEDDING) else _LINEAR


def _tensors(path: str, factors: Factors) -> list[tuple[str, Shape, Array]]:
    ends = ("lora_embedding_A", "lora_embedding_B") if factors.embedding else ("lora_A.weight", "lora_B.weight")
    outputs = (*factors.lora_B.shape, *(1 for _ in factors.inputs[1:]))
    return [
        (f"base_model.model.{path}.{ends[0]}", (factors.r, *factors.inputs), factors.lora_A),
        (f"base_model.model.{path}.{ends[1]}", outputs, factors.lora_B),
    ]


def _config(modules: Mapping[str, Factors], about: About) -> LoraConfig:
    ranks = {path: factors.r for path, factors in modules.items()}
    alphas = {path: _plain(factors.scaling * factors.r) for path, factors in modules.items()}
    r = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    alpha = max(Counter(alphas.values()).items(), key=lambda item: (item[1], item[0]))[0]
    task: dict[str, Any] = {"task_type": about.task_type} if about.task_type else {}
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=tuple(about.targets or modules),
        rank_pattern={path: rank for path, rank in ranks.items() if rank != r},
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
        fan_in_fan_out=about.fan_in_fan_out,
        base_model_name_or_path=about.base_model,
        revision=about.revision,
        **task,
    )
    for path in modules:
        if config.rank_for(path) != ranks[path]:
            raise KeyMismatch(f"{path} ends like another module's whole path; patterns cannot tell them apart")
    return config


def _plain(number: float) -> float:
    """16 rather than 16.0, as PEFT writes it."""
    return int(number) if number.is_integer() else number


def _float32(name: str, values: Array) -> Array:
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(narrow).all():
        raise NonFinite(f"{name} becomes larger than a float32 can be", tensor=name)
    return narrow
