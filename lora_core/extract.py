"""An adapter from a merged checkpoint and its base: the low-rank part of what the two differ in. Needs no torch.

Memory is the largest matrix in float32 and the factors found so far, whatever the model's size.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lora_core import strict_json
from lora_core.architectures import ARCHITECTURES
from lora_core.config import MAX_RANK
from lora_core.errors import BadAdapter, BadBase, BadConfig, DifferentBases, KeyMismatch, NonFinite, ShapeMismatch
from lora_core.factors import About, Factors, write_factors
from lora_core.floats import FLOATS, Array, widen
from lora_core.header import TensorInfo
from lora_core.keymap import EMBEDDINGS, OUTPUT_LAYERS, Keymap, Place, is_conv1d
from lora_core.lowrank import Decomposition
from lora_core.shards import ByteReader, ShardIndex, open_checkpoint

_BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class ExtractedModule:
    """One changed matrix W: its factors' rank, the share of ‖Δ‖²_F they hold, and ‖Δ‖/‖W‖."""

    path: str
    rank: int
    retained_energy: float
    relative_change: float


@dataclass(frozen=True)
class ExtractReport:
    """`left_out`: changed tensors that no factors stand for (norms, biases, embeddings) → their ‖Δ‖/‖W‖."""

    modules: list[ExtractedModule]
    left_out: Mapping[str, float]


@dataclass(frozen=True)
class _Place:
    """The module that a tensor is the weight of, and whether it is stored as (in, out)."""

    path: str
    transposed: bool


def extract(
    base_dir: Path,
    merged_dir: Path,
    out: Path,
    *,
    rank: int,
    energy: float | None = None,
    keymap: Keymap | None = None,
    leave_out: bool = False,
    base_model: str | None = None,
    seed: int = 0,
) -> ExtractReport:
    """Write the adapter that takes the base to the merged checkpoint as nearly as `rank` allows, to a new folder.

    With `energy` each module has the least rank that keeps this share of ‖Δ‖²_F, and at most `rank`. Tensors that
    changed and are no linear layer's are an error, unless `leave_out`. A `keymap` (lora_core.keymap_torch) is needed
    where checkpoints of the family do not use the model's names. Another vocabulary is ShapeMismatch.
    """
    if not 1 <= rank <= MAX_RANK:
        raise BadConfig(f"rank must be a whole number from 1 to {MAX_RANK}, not {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise BadConfig(f"energy must be above 0 and at most 1, not {energy!r}")
    base, merged = open_checkpoint(base_dir), open_checkpoint(merged_dir)
    config = _common_config(base_dir, merged_dir)
    _check_tensors(base.tensors(), merged.tensors())
    places = _places(keymap, base.tensors(), config)
    factors: dict[str, Factors] = {}
    modules: list[ExtractedModule] = []
    left_out: dict[str, float] = {}
    with ExitStack() as stack:
        pair = [_Weights(stack, *checkpoint) for checkpoint in ((base_dir, base), (merged_dir, merged))]
        for name in sorted(base.tensors()):
            delta, relative = _difference(name, *pair)
            if delta is None:
                continue
            if (place := places.get(name)) is None:
                left_out[name] = relative
                continue
            parts = Decomposition.of_matrix(delta.T if place.transposed else delta, rank, f"{seed}:{place.path}")
            kept = min(parts.rank_for(energy) if energy else rank, len(parts.sigma))
            lora_B, lora_A = parts.factors(kept)
            factors[place.path] = Factors(lora_A, lora_B, 1.0, (lora_A.shape[1],))
            modules.append(ExtractedModule(place.path, kept, parts.retained(kept), relative))
    if left_out and not leave_out:
        raise KeyMismatch(f"{_names(left_out)} changed too, and no factors can stand for that", missing=list(left_out))
    if not factors:
        raise BadAdapter("no matrix of a linear layer differs between the two checkpoints")
    write_factors(out, factors, _about(factors, places, base_model))
    return ExtractReport(modules, left_out)


class _Weights:
    """Rows of the tensors of a checkpoint."""

    def __init__(self, stack: ExitStack, directory: Path, index: ShardIndex) -> None:
        self.tensors = index.tensors()
        self._places = {
            tensor.name: (reader, header.data_start + tensor.begin)
            for shard, header in index.headers.items()
            for reader in [stack.enter_context(ByteReader(directory / shard))]
            for tensor in header.tensors
        }

    def blocks(self, name: str, rows: int) -> Iterator[Array]:
        """The tensor in float64, so many rows at a time."""
        reader, begin = self._places[name]
        tensor = self.tensors[name]
        size = tensor.end - tensor.begin
        step = rows * (size // max(tensor.shape[0], 1)) if tensor.shape else size
        for offset in range(0, size, max(step, 1)):
            yield widen(reader.read(begin + offset, min(step, size - offset)), tensor.dtype)


def _difference(name: str, base: _Weights, merged: _Weights) -> tuple[Array | None, float]:
    """merged − base in float32, (rows, columns), and its size relative to the base; None if they are the same."""
    shape = base.tensors[name].shape
    columns = max(prod(shape[1:]), 1)
    rows = max(_BLOCK_BYTES // (8 * columns), 1)
    delta: Array | None = None
    position, squares = 0, np.zeros(2)
    for weight, target in zip(base.blocks(name, rows), merged.blocks(name, rows), strict=True):
        change = target - weight
        if not np.isfinite(change).all():
            raise NonFinite(f"{name} holds NaN or infinity", tensor=name)
        squares += np.vecdot(change, change), np.vecdot(weight, weight)
        if delta is None and change.any():
            delta = np.zeros(prod(shape), np.float32)
        if delta is not None:
            delta[position : position + change.size] = change
        position += change.size
    if delta is None:
        return None, 0.0
    relative = float(np.sqrt(squares[0] / squares[1])) if squares[1] else float("inf")
    return delta.reshape(-1, columns), relative


def _common_config(base_dir: Path, merged_dir: Path) -> Mapping[str, Any]:
    """The base's config.json; the merged one must be of the same kind of model."""
    configs = []
    for directory in (base_dir, merged_dir):
        try:
            configs.append(strict_json.loads((directory / "config.json").read_bytes()))
        except (OSError, ValueError) as error:
            raise BadBase(f"config.json of {directory.name} cannot be read: {error}") from None
    families = [config.get("model_type") if isinstance(config, dict) else None for config in configs]
    if families[0] != families[1]:
        raise DifferentBases(f"the base is a {families[0]}, the merged checkpoint a {families[1]}")
    return configs[0]


def _check_tensors(base: Mapping[str, TensorInfo], merged: Mapping[str, TensorInfo]) -> None:
    for name in sorted(base.keys() & merged.keys()):
        shapes = base[name].shape, merged[name].shape
        if shapes[0] != shapes[1]:
            vocabulary = name.rpartition(".")[0].rpartition(".")[2] in (*EMBEDDINGS, *OUTPUT_LAYERS)
            why = "the vocabulary changed, which factors cannot express" if vocabulary else "this is another model"
            raise ShapeMismatch(f"{name} is {list(shapes[0])} in the base and {list(shapes[1])} merged: {why}")
        for tensor in (base[name], merged[name]):
            if tensor.dtype not in FLOATS:
                raise BadBase(f"{name} is {tensor.dtype}; only {', '.join(sorted(FLOATS))} can be compared")
    if odd := sorted(base.keys() ^ merged.keys()):
        where = "base" if odd[0] in base else "merged checkpoint"
        raise KeyMismatch(f"only the {where} has {_names(odd)}", missing=odd)


def _places(keymap: Keymap | None, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, _Place]:
    """Tensor → the linear layer whose weight it is. Tied layers are none: a change of one would be one of both."""
    if keymap is not None:
        return _places_by_keymap(keymap, tensors)
    family = config.get("model_type")
    architecture = ARCHITECTURES.get(family) if isinstance(family, str) else None
    if architecture is None or not architecture.literal_names:
        raise KeyMismatch(f"which tensors of a {family} belong to which module, only a key map tells")
    tied = OUTPUT_LAYERS if config.get("tie_word_embeddings") is True else ()
    other = {architecture.embedding, *architecture.not_linear, *tied}
    paths = {name: architecture.module_path(name) for name in tensors}
    return {
        name: _Place(path, is_conv1d(family, path.rpartition(".")[2]))
        for name, path in paths.items()
        if name.endswith(".weight") and len(tensors[name].shape) == 2 and path.rpartition(".")[2] not in other
    }


def _places_by_keymap(keymap: Keymap, tensors: Mapping[str, TensorInfo]) -> dict[str, _Place]:
    tied = {*keymap.tied, *keymap.tied.values()}
    found = {}
    for parameter, places in keymap.places.items():
        path, _, last = parameter.rpartition(".")
        linear = parameter in keymap.linear or path.rpartition(".")[2] in OUTPUT_LAYERS
        if not linear or last != "weight" or parameter in tied or len(places) > 1:
            continue
        tensor, turned = places[0].tensor, places[0].transposed
        if places[0] == Place(tensor=tensor, transposed=turned) and len(tensors[tensor].shape) == 2:
            found[tensor] = _Place(path, (path in keymap.conv1d) != turned)
    return found


def _about(factors: Mapping[str, Factors], places: Mapping[str, _Place], base_model: str | None) -> About:
    """Targets by last name, where that names just the modules that changed."""
    lasts = frozenset(path.rpartition(".")[2] for path in factors)
    named = {place.path for place in places.values() if place.path.rpartition(".")[2] in lasts}
    return About(
        base_model=base_model,
        revision=None,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(place.transposed for place in places.values() if place.path in factors),
        targets=lasts if named == factors.keys() else None,
    )


def _names(tensors: Mapping[str, float] | list[str]) -> str:
    listed = list(tensors)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
