"""The check an adapter folder passes before it is published or merged. Reads two files; needs no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_core.config import MAX_CONFIG_BYTES, LoraConfig, match_targets
from lora_core.errors import BadAdapter, BadConfig, KeyMismatch, NonFinite, ShapeMismatch, UnknownTargetModules
from lora_core.floats import FLOATS, Array, widen
from lora_core.header import ADAPTER_HEADER_BYTES, Header, TensorInfo, read_header
from lora_core.shards import ByteReader

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<path>[A-Za-z0-9_.]+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class Pair:
    """The two factors of one module as they lie in the file: lora_A (r, in), lora_B (out, r)."""

    lora_A: TensorInfo
    lora_B: TensorInfo

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product."""
        return self.lora_B.shape[0], self.lora_A.shape[1]


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter is: its configuration and, per module path, (out, r, in)."""

    config: LoraConfig
    modules: Mapping[str, tuple[int, int, int]]
    parameter_count: int


def read_adapter_config(directory: Path) -> LoraConfig:
    """`adapter_config.json` of the folder. A missing file is BadAdapter."""
    config = LoraConfig.from_peft_json(read_config_bytes(directory))
    for name in ("use_dora", "target_parameters"):
        if getattr(config, name):
            raise BadConfig(f"{name} is set, and such adapters are not checked here yet")
    return config


def read_config_bytes(directory: Path) -> bytes:
    """The content of `adapter_config.json`, if it is not too large. A missing file is BadAdapter."""
    path = _file(directory, CONFIG_FILE)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise BadConfig(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
    return path.read_bytes()


def read_adapter_header(directory: Path) -> Header:
    """Header of `adapter_model.safetensors`. A missing file is BadAdapter."""
    return read_header(_file(directory, WEIGHTS_FILE), max_bytes=ADAPTER_HEADER_BYTES)


def adapter_pairs(header: Header, config: LoraConfig) -> dict[str, Pair]:
    """Module path → its factors. Every tensor is used, every pair is whole, and r is what the config says."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    for tensor in header.tensors:
        match = _KEY.fullmatch(tensor.name)
        if match is None:
            raise KeyMismatch(f"{tensor.name} is not lora_A.weight or lora_B.weight of a module: unsupported")
        if tensor.dtype not in FLOATS:
            raise BadAdapter(f"{tensor.name} has the dtype {tensor.dtype}, which is not a float")
        factors.setdefault(match["path"], {})[match["factor"]] = tensor
    if not factors:
        raise BadAdapter(f"{WEIGHTS_FILE} holds no tensor: the adapter is empty")
    pairs = {path: _pair(path, found, config.rank_for(path)) for path, found in sorted(factors.items())}
    try:
        matched = set(match_targets(config, pairs))
    except UnknownTargetModules as error:
        unknown = ", ".join(error.details["unknown"])
        raise KeyMismatch(f"target_modules names {unknown}, of which the file has no tensor") from None
    if surplus := sorted(pairs.keys() - matched):
        raise KeyMismatch(f"{surplus[0]} has tensors but is not in target_modules")
    return pairs


def read_factor(reader: ByteReader, header: Header, tensor: TensorInfo) -> Array:
    """One factor as float64. NaN and infinity are NonFinite."""
    raw = reader.read(header.data_start + tensor.begin, tensor.end - tensor.begin)
    values = widen(raw, tensor.dtype)
    if not np.isfinite(values).all():
        raise NonFinite(f"{tensor.name} holds NaN or infinity", tensor=tensor.name)
    return values.reshape(tensor.shape)


def check_adapter(directory: Path) -> AdapterFacts:
    """Read all of the adapter in `directory` and refuse what PEFT, vLLM or a merge could not use.

    Beyond form: all numbers are finite, and at least one lora_B is not all zero (else nothing was learned).
    """
    config = read_adapter_config(directory)
    header = read_adapter_header(directory)
    pairs = adapter_pairs(header, config)
    changes_something = False
    with ByteReader(directory / WEIGHTS_FILE) as reader:
        for pair in pairs.values():
            read_factor(reader, header, pair.lora_A)
            changes_something |= bool(read_factor(reader, header, pair.lora_B).any())
    if not changes_something:
        raise BadAdapter("every lora_B is zero: this adapter changes nothing")
    modules = {path: (pair.shape[0], pair.lora_A.shape[0], pair.shape[1]) for path, pair in pairs.items()}
    return AdapterFacts(config, modules, sum(r * (rows + columns) for rows, r, columns in modules.values()))


def _pair(path: str, found: Mapping[str, TensorInfo], r: int) -> Pair:
    for factor in "AB":
        if factor not in found:
            raise KeyMismatch(f"{path} has no lora_{factor}.weight")
    pair = Pair(found["A"], found["B"])
    for tensor, axis in ((pair.lora_A, 0), (pair.lora_B, 1)):
        if len(tensor.shape) != 2 or 0 in tensor.shape or tensor.shape[axis] != r:
            raise ShapeMismatch(f"{tensor.name} has shape {list(tensor.shape)}; axis {axis} should be r = {r}")
    return pair


def _file(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise BadAdapter(f"the adapter lacks {name}")
    return path
