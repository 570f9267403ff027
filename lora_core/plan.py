"""Which tensor of an adapter goes to which tensor of a base: known from headers, before any arithmetic."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.config import OUTPUT_LAYER, LoraConfig
from lora_core.errors import BadBase, KeyMismatch, ShapeMismatch
from lora_core.floats import FLOATS
from lora_core.gate import Pair, adapter_pairs, read_adapter_config, read_adapter_header
from lora_core.header import Header, TensorInfo
from lora_core.recipe import LowRank, Recipe, TensorRecipe
from lora_core.shards import ShardIndex, open_checkpoint

_EMBEDDINGS = ("embed_tokens", "wte")
_OUTPUT_LAYERS = (OUTPUT_LAYER, "embed_out")


@dataclass(frozen=True)
class MergePlan:
    """The base's shards, the adapter's header, and what each output tensor is made of."""

    index: ShardIndex
    adapter_header: Header
    recipe: Recipe


def plan_merge(base_dir: Path, adapter_dir: Path) -> MergePlan:
    """Match every adapter tensor to exactly one tensor of the base, or raise KeyMismatch or ShapeMismatch."""
    index = open_checkpoint(base_dir)
    config = read_adapter_config(adapter_dir)
    header = read_adapter_header(adapter_dir)
    base_config = json.loads((base_dir / "config.json").read_bytes())
    return MergePlan(index, header, make_recipe(index.tensors(), base_config, header, config))


def make_recipe(
    tensors: Mapping[str, TensorInfo], base_config: Mapping[str, Any], adapter: Header, config: LoraConfig
) -> Recipe:
    """The recipe of a merge from the base's tensors and config.json and the adapter's header and config."""
    pairs = adapter_pairs(adapter, config)
    _check_embeddings(base_config, pairs)
    names = checkpoint_names(list(pairs), tensors)
    for path, pair in pairs.items():
        _check_fit(tensors[names[path]], pair.shape[::-1] if config.fan_in_fan_out else pair.shape)
    return Recipe({names[path]: _add(tensors[names[path]], pair, config, path) for path, pair in sorted(pairs.items())})


def _add(base: TensorInfo, pair: Pair, config: LoraConfig, path: str) -> TensorRecipe:
    term = LowRank(
        lora_A=pair.lora_A.name,
        lora_B=pair.lora_B.name,
        scaling=config.scaling_for(path),
        transposed=config.fan_in_fan_out,
    )
    return TensorRecipe(base=base.name, dtype=base.dtype, shape=base.shape, columns=base.shape[1], terms=(term,))


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


def _check_embeddings(base_config: Mapping[str, Any], paths: Iterable[str]) -> None:
    tied = base_config.get("tie_word_embeddings", False)
    for path in paths:
        name = path.rpartition(".")[2]
        if name in _EMBEDDINGS:
            raise KeyMismatch(f"{path} is an embedding, whose factors have other names and another layout")
        # One matrix serves input and output: adding to it would change both, and the adapter was trained on one.
        if tied and name in _OUTPUT_LAYERS:
            raise KeyMismatch(f"the base ties its input and output layer, and the adapter changes {path}")
