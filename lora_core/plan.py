"""Which tensor of an adapter goes to which tensor of a base: known from headers, before any arithmetic."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_core.config import OUTPUT_LAYER, LoraConfig
from lora_core.errors import BadBase, KeyMismatch, ShapeMismatch
from lora_core.floats import FLOATS
from lora_core.gate import Pair, adapter_pairs, read_adapter_config, read_adapter_header
from lora_core.header import Header, TensorInfo
from lora_core.shards import ShardIndex, open_checkpoint

_EMBEDDINGS = ("embed_tokens", "wte")
_OUTPUT_LAYERS = (OUTPUT_LAYER, "embed_out")


@dataclass(frozen=True)
class Update:
    """The factors for one checkpoint tensor, and the scaling of their product."""

    pair: Pair
    scaling: float


@dataclass(frozen=True)
class MergePlan:
    """`updates` maps checkpoint tensors to what is added to them; all others are only copied."""

    index: ShardIndex
    config: LoraConfig
    adapter_header: Header
    updates: Mapping[str, Update]


def plan_merge(base_dir: Path, adapter_dir: Path) -> MergePlan:
    """Match every adapter tensor to exactly one tensor of the base, or raise KeyMismatch or ShapeMismatch."""
    index = open_checkpoint(base_dir)
    config = read_adapter_config(adapter_dir)
    header = read_adapter_header(adapter_dir)
    pairs = adapter_pairs(header, config)
    _check_embeddings(base_dir, pairs)
    tensors = index.tensors()
    names = checkpoint_names(list(pairs), tensors)
    for path, pair in pairs.items():
        _check_fit(tensors[names[path]], pair.shape[::-1] if config.fan_in_fan_out else pair.shape)
    updates = {names[path]: Update(pair, config.scaling_for(path)) for path, pair in pairs.items()}
    return MergePlan(index, config, header, updates)


def checkpoint_names(paths: list[str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Module path → checkpoint tensor, one to one. Checkpoints differ in whether the trunk's prefix is written;
    exactly one way must fit all paths."""
    ways: set[tuple[str, ...]] = set()
    missing = paths
    for prefix in ("", "model.", "transformer."):
        without = tuple(f"{path.removeprefix(prefix)}.weight" for path in paths)
        for names in (without, tuple(f"{prefix}{path}.weight" for path in paths)):
            absent = [path for path, name in zip(paths, names, strict=True) if name not in tensors]
            if not absent and len(set(names)) == len(names):
                ways.add(names)
            elif len(absent) < len(missing):
                missing = absent
    if len(ways) > 1:
        raise KeyMismatch(f"{paths[0]} fits more than one tensor of the base, with and without a prefix")
    if not ways:
        raise KeyMismatch(f"the base has no weight for {', '.join(missing[:5])}", missing=missing)
    return dict(zip(paths, ways.pop(), strict=True))


def _check_fit(tensor: TensorInfo, shape: tuple[int, int]) -> None:
    if tensor.shape != shape:
        raise ShapeMismatch(f"{tensor.name} has shape {list(tensor.shape)}, the adapter's product {list(shape)}")
    if tensor.dtype not in FLOATS:
        raise BadBase(f"{tensor.name} is {tensor.dtype}; only {', '.join(sorted(FLOATS))} can be merged into")


def _check_embeddings(base_dir: Path, paths: Iterable[str]) -> None:
    tied = json.loads((base_dir / "config.json").read_bytes()).get("tie_word_embeddings", False)
    for path in paths:
        name = path.rpartition(".")[2]
        if name in _EMBEDDINGS:
            raise KeyMismatch(f"{path} is an embedding, whose factors have other names and another layout")
        # One matrix serves input and output: adding to it would change both, and the adapter was trained on one.
        if tied and name in _OUTPUT_LAYERS:
            raise KeyMismatch(f"the base ties its input and output layer, and the adapter changes {path}")
