"""Which tensor of an adapter goes to which tensor of a base: known from headers, before any arithmetic."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from lora_core import strict_json
from lora_core.adapter_names import AdaptedModule, adapted_modules
from lora_core.architectures import ARCHITECTURES
from lora_core.changes import Adapted, Changes, find_changes, needed_parameters
from lora_core.errors import BadBase, KeyMismatch, ShapeMismatch
from lora_core.floats import FLOATS
from lora_core.gate import read_adapter_header, read_config_bytes
from lora_core.header import Header, TensorInfo
from lora_core.keymap import EMBEDDINGS, OUTPUT_LAYERS, Keymap, Place, infer_keymap
from lora_core.merge_options import Start
from lora_core.nf4 import BLOCK
from lora_core.peft_config import AdapterConfig
from lora_core.recipe import LowRank, Recipe, TensorRecipe
from lora_core.shards import ShardIndex, open_checkpoint
from lora_core.targets import ends


@dataclass(frozen=True)
class MergePlan:
    """The base's shards, the adapter's header, and what each output tensor is made of."""

    index: ShardIndex
    adapter_header: Header
    recipe: Recipe


def plan_merge(
    base_dir: Path, adapter_dir: Path, *, keymap: Keymap | None = None, start: Start = "original"
) -> MergePlan:
    """Match every adapter tensor to the tensors of the base, or raise KeyMismatch or ShapeMismatch."""
    index = open_checkpoint(base_dir)
    config = AdapterConfig.from_json(read_config_bytes(adapter_dir))
    header = read_adapter_header(adapter_dir)
    base_config = strict_json.loads((base_dir / "config.json").read_bytes())
    recipe = make_recipe(index.tensors(), base_config, header, config, keymap=keymap, start=start)
    return MergePlan(index, header, recipe)


def make_recipe(
    tensors: Mapping[str, TensorInfo],
    base_config: Mapping[str, Any],
    adapter: Header,
    config: AdapterConfig,
    *,
    keymap: Keymap | None = None,
    start: Start = "original",
) -> Recipe:
    """The recipe of a merge, from the base's tensors and config.json and the adapter's header and configuration.

    Every tensor of the adapter is used, but for empty ones of modules that AdaLoRA pruned away. Without a `keymap`
    one is inferred from names. Where input and output layer are tied and the adapter makes them differ, the recipe
    writes both and says so in `config_changes`. With `start` = "nf4" linear layers, adapted or not, start from what
    4 bits leave of them: the W0 that a QLoRA training saw.
    """
    modules = adapted_modules(adapter)
    needed = needed_parameters(modules, config)
    if keymap is None:
        keymap = infer_keymap(needed, tensors, base_config, transposed=config.fan_in_fan_out)
    keymap = _with_own_names(keymap, needed, tensors)
    _check_targets(modules, config, tensors)
    changes = find_changes(modules, config, keymap)
    recipes, untied = _untie(changes, keymap, tensors)
    for parameter in changes.parameters():
        for place in keymap.places.get(parameter, ()):
            recipe = _part(tensors[place.tensor], place, parameter, changes)
            before = recipes.get(place.tensor)
            recipes[place.tensor] = _joined(before, recipe) if before else recipe
    config_changes = _untied(base_config) if untied else {}
    config_changes |= _vocabulary(recipes, tensors)
    if start == "nf4":
        _quantise(recipes, tensors, keymap, base_config)
    used = set().union(*(recipe.adapter_tensors() for recipe in recipes.values()))
    if unused := [tensor.name for tensor in adapter.tensors if tensor.name not in used and 0 not in tensor.shape]:
        raise KeyMismatch(f"{unused[0]} would be used nowhere", missing=unused)
    kept = {name: recipe for name, recipe in sorted(recipes.items()) if not recipe.is_copy or recipe.base != name}
    return Recipe(kept, config_changes)


def from_nf4(recipe: Recipe, tensors: Mapping[str, TensorInfo], base_config: Mapping[str, Any]) -> Recipe:
    """The recipe of the same merge, started from what 4 bits leave of the base's linear layers. KeyMismatch for bases
    of which not even that can be told without transformers."""
    recipes = dict(recipe.tensors)
    _quantise(recipes, tensors, infer_keymap([], tensors, base_config, transposed=False), base_config)
    return Recipe(dict(sorted(recipes.items())), recipe.config_changes)


def _with_own_names(keymap: Keymap, needed: list[str], tensors: Mapping[str, TensorInfo]) -> Keymap:
    """Adapters of older libraries call modules what the checkpoint calls them; such names are their own places."""
    strange = [name for name in needed if name not in keymap.places and name not in keymap.tied]
    for name in strange:
        if name in keymap.opaque:
            raise KeyMismatch(f"{name} is made from the checkpoint by {keymap.opaque[name]}, which is not supported")
    if missing := [name for name in strange if name not in tensors]:
        raise KeyMismatch(f"the base has no tensor for {', '.join(missing[:5])}", missing=missing)
    places = {name: (Place(tensor=name),) for name in strange}
    shapes = {name: tensors[name].shape for name in strange}
    return replace(keymap, places={**keymap.places, **places}, shapes={**keymap.shapes, **shapes})


def _check_targets(modules: list[AdaptedModule], config: AdapterConfig, tensors: Mapping[str, TensorInfo]) -> None:
    """Where the config lists names: each module with factors is among them, and no listed one lacks factors."""
    if config.target_modules is None:
        return
    paths = {module.path for module in modules if module.roles.keys() - {"new_rows"}}
    names = {*config.target_modules, *(target.rpartition(".")[0] for target in config.target_parameters)}
    for path in sorted(paths):
        tied = config.ensure_weight_tying and path.rpartition(".")[2] in OUTPUT_LAYERS
        if not tied and names.isdisjoint(ends(path)):
            raise KeyMismatch(f"{path} has tensors but is not in target_modules")
    unused = {name for name in config.target_modules if not config.may_lack(name)}.difference(*map(ends, paths))
    if lacking := sorted(unused.intersection(end for name in tensors for end in ends(name.rpartition(".")[0]))):
        raise KeyMismatch(f"target_modules names {lacking[0]}, of which the file has no tensor")


def _untie(changes: Changes, keymap: Keymap, tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorRecipe], bool]:
    """Tensors to add because tied layers no longer share one, and whether any no longer do.

    PEFT trains one side of a tie against the base's matrix on the other side: the two differ afterwards. Only new
    rows for tokens are shared, by PEFT itself. A stored copy of the base's matrix stands for both sides.
    """
    recipes: dict[str, TensorRecipe] = {}
    untied = False
    for head, source in keymap.tied.items():
        touched = set(changes.parameters()) & {head, source}
        if touched == {source} and not {source} & (changes.replaced.keys() | changes.adapted.keys()):
            if head in keymap.places:
                changes.new_rows[head] = changes.new_rows[source]
        elif touched:
            untied = True
            for one, other in ((source, head), (head, source)):
                copy = changes.replaced.get(one)
                if copy and copy.is_base:
                    changes.replaced.setdefault(other, copy)
            if head not in keymap.places:
                if head not in keymap.new_names:
                    raise KeyMismatch(f"the adapter makes {head} differ from {source}, with which the base ties it")
                base = tensors[keymap.places[source][0].tensor]
                recipes[keymap.new_names[head]] = _whole(base, head, changes)
    return recipes, untied


def _part(base: TensorInfo, place: Place, parameter: str, changes: Changes) -> TensorRecipe:
    """What a change of `parameter` does to the tensor that `place` names."""
    if place.is_whole:
        return _whole(base, parameter, changes)
    adapted = changes.adapted.get(parameter)
    if adapted is None or adapted.magnitude or parameter in changes.replaced or parameter in changes.new_rows:
        raise KeyMismatch(f"{parameter} is stored in parts ({base.name}); only factors can be merged into those")
    rows, *rest = adapted.product[::-1] if place.transposed else adapted.product
    begin, end = place.rows or (0, rows)
    if [*base.shape[1:]] != rest or end > rows or place.first + end - begin > base.shape[0]:
        raise ShapeMismatch(f"{base.name} has shape {list(base.shape)}, the product {list(adapted.product)}")
    term = replace(
        adapted.term,
        expert=None if place.expert is None else (place.expert, adapted.experts or 1),
        rows=place.rows,
        first=place.first,
        transposed=adapted.term.transposed != place.transposed,
    )
    return _tensor_recipe(base, terms=(term,) if adapted.r else ())


def _whole(base: TensorInfo, parameter: str, changes: Changes) -> TensorRecipe:
    """What becomes of `base` if it is all of `parameter`."""
    recipe = _tensor_recipe(base)
    if replaced := changes.replaced.get(parameter):
        shape = replaced.tensor.shape
        resized = _layer(parameter) in (*EMBEDDINGS, *OUTPUT_LAYERS)
        if shape[1:] != base.shape[1:] or (shape != base.shape and not resized):
            raise ShapeMismatch(f"{base.name} has shape {list(base.shape)}, {replaced.tensor.name} {list(shape)}")
        recipe = replace(recipe, base=None, replaced_by=replaced.tensor.name, shape=shape)
    if parameter in changes.new_rows:
        new_rows, indices = changes.new_rows[parameter]
        if new_rows.shape[1:] != recipe.shape[1:] or max(indices) >= recipe.shape[0]:
            raise ShapeMismatch(f"{new_rows.name} holds rows that {base.name} has not")
        recipe = replace(recipe, new_rows=new_rows.name, row_indices=indices)
    if adapted := changes.adapted.get(parameter):
        experts = (adapted.experts,) if adapted.experts else ()
        if recipe.shape != (*experts, *adapted.product):
            product = [*experts, *adapted.product]
            raise ShapeMismatch(f"{base.name} has shape {list(recipe.shape)}, the adapter's product {product}")
        recipe = replace(recipe, terms=tuple(_terms(adapted)))
        if adapted.experts:
            recipe = replace(recipe, columns=recipe.shape[-1])
        if adapted.magnitude:
            name, of_columns = adapted.magnitude.name, adapted.term.transposed
            recipe = replace(recipe, magnitude=name, magnitude_of_columns=of_columns)
    return recipe


def _terms(adapted: Adapted) -> Iterator[LowRank]:
    if not adapted.r:  # AdaLoRA can prune all of a module's rank; its factors are empty then
        return
    if adapted.experts is None:
        yield adapted.term
    else:
        for expert in range(adapted.experts):
            yield replace(adapted.term, expert=(expert, adapted.experts), first=expert * adapted.product[0])


def _tensor_recipe(base: TensorInfo, terms: tuple[LowRank, ...] = ()) -> TensorRecipe:
    if base.dtype not in FLOATS:
        raise BadBase(f"{base.name} is {base.dtype}; only {', '.join(sorted(FLOATS))} can be merged into")
    return TensorRecipe(base=base.name, dtype=base.dtype, shape=base.shape, columns=prod(base.shape[1:]), terms=terms)


def _joined(first: TensorRecipe, second: TensorRecipe) -> TensorRecipe:
    """Two parameters that lie in one tensor."""
    if replace(first, terms=()) != replace(second, terms=()):
        raise KeyMismatch(f"{first.base} holds several parameters, of which not all are merged the same way")
    return replace(first, terms=first.terms + second.terms)


def _quantise(
    recipes: dict[str, TensorRecipe],
    tensors: Mapping[str, TensorInfo],
    keymap: Keymap,
    base_config: Mapping[str, Any],
) -> None:
    """Have the tensors of linear layers start from their 4-bit numbers."""
    architecture = ARCHITECTURES.get(str(base_config.get("model_type")))
    if keymap.inferred and not (architecture and architecture.literal_names):
        raise KeyMismatch("which layers are linear can be told only by a key map made with transformers")
    weights = sorted(
        name
        for name, tensor in tensors.items()
        if keymap.inferred and len(tensor.shape) == 2 and _layer(name) not in (*EMBEDDINGS, *OUTPUT_LAYERS)
    )
    for parameter in sorted(keymap.linear):
        if parameter.rpartition(".")[0] in keymap.conv1d or not keymap.places[parameter][0].is_whole:
            raise KeyMismatch(f"{parameter} is not stored as it is computed with; its 4-bit numbers are not known")
        weights.append(keymap.places[parameter][0].tensor)
    for name in weights:
        recipe = recipes.get(name) or _tensor_recipe(tensors[name])
        if recipe.base != name or recipe.columns % BLOCK:
            raise KeyMismatch(
                f"{name} cannot be taken in 4 bits: it is replaced, or its rows are no multiple of {BLOCK}"
            )
        recipes[name] = replace(recipe, quantised="nf4")


def _layer(tensor: str) -> str:
    """The module's own name: model.embed_tokens.weight → embed_tokens."""
    return tensor.rpartition(".")[0].rpartition(".")[2]


def _untied(base_config: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {"tie_word_embeddings": False}
    text = base_config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changed["text_config"] = text | changed
    return changed


def _vocabulary(recipes: Mapping[str, TensorRecipe], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The new size, if the adapter brings input and output layers of another one."""
    layers = {
        name: recipes[name].shape[0] if name in recipes else tensors[name].shape[0]
        for name in (*tensors, *recipes)
        if name.endswith(".weight") and _layer(name) in (*EMBEDDINGS, *OUTPUT_LAYERS)
    }
    if all(name in tensors and tensors[name].shape[0] == size for name, size in layers.items() if name in tensors):
        return {}
    if len(set(layers.values())) > 1:
        raise ShapeMismatch("the adapter resizes the vocabulary of the input or the output layer, but not of both")
    return {"vocab_size": next(iter(layers.values()))}
