"""What an adapter does to each parameter of a model, before anybody asks where the parameter is stored."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from lora_core.adapter_names import AdaptedModule, require
from lora_core.errors import KeyMismatch, ShapeMismatch
from lora_core.header import TensorInfo
from lora_core.keymap import EMBEDDINGS, OUTPUT_LAYERS, Keymap
from lora_core.peft_config import AdapterConfig
from lora_core.recipe import LowRank
from lora_core.targets import matches, saved_module

Shape = tuple[int, ...]
_FACTORS = frozenset({"lora_A", "lora_B", "lora_E", "embedding_A", "embedding_B", "magnitude"})
_SWAPPED_SINCE, _SWAPPED_UNLESS_TRANSPOSED_SINCE = (0, 19, 0), (0, 19, 1)


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A product added to a parameter of the shape `product`, or one for each of `experts` matrices of that shape."""

    term: LowRank
    product: Shape
    r: int = 1
    experts: int | None = None
    magnitude: TensorInfo | None = None


@dataclass(frozen=True)
class Replaced:
    """A whole parameter in the adapter. `is_base`: it stands for the base's own, before anything learned."""

    tensor: TensorInfo
    is_base: bool


@dataclass(frozen=True)
class Changes:
    """By parameter of the model: what it is replaced by, which of its rows are new, what is added to it."""

    replaced: dict[str, Replaced] = field(default_factory=dict)
    new_rows: dict[str, tuple[TensorInfo, tuple[int, ...]]] = field(default_factory=dict)
    adapted: dict[str, Adapted] = field(default_factory=dict)

    def parameters(self) -> list[str]:
        """All that are changed, sorted."""
        return sorted(self.replaced.keys() | self.new_rows.keys() | self.adapted.keys())


def needed_parameters(modules: Iterable[AdaptedModule], config: AdapterConfig) -> list[str]:
    """The parameters that an adapter changes, as far as the names in its file tell."""
    names: set[str] = set()
    for module in modules:
        names |= {f"{module.path}.{name}" for name in (*module.saved, *module.saved_base)}
        if "lora_bias" in module.roles:
            names.add(f"{module.path}.bias")
        if module.roles.keys() & (_FACTORS | {"new_rows"}):
            names |= {f"{module.path}.{name}" for name in targeted_parameters(module.path, config) or ["weight"]}
    return sorted(names)


def find_changes(modules: list[AdaptedModule], config: AdapterConfig, keymap: Keymap) -> Changes:
    """Every tensor of every module in exactly one change, or KeyMismatch or ShapeMismatch."""
    changes = Changes()
    for module in modules:
        path, roles = module.path, module.roles
        for name, tensor in module.saved.items():
            changes.replaced[f"{path}.{name}"] = Replaced(tensor, is_base=not is_announced(path, name, config))
        for name, tensor in module.saved_base.items():
            # with bias="all" or "lora_only" it is the base's bias that was trained
            changes.replaced[f"{path}.{name}"] = Replaced(tensor, is_base=name == "weight")
        if new_rows := roles.get("new_rows"):
            changes.new_rows[f"{path}.weight"] = new_rows, token_indices(path, new_rows, config)
        if bias := roles.get("lora_bias"):
            if config.use_dora:
                raise KeyMismatch(f"{path} has a bias of lora_B and DoRA together, which no method defines")
            term = LowRank(lora_A=None, lora_B=bias.name, scaling=config.scaling_for(path))
            changes.adapted[f"{path}.bias"] = Adapted(term=term, product=bias.shape)
        if roles.keys() & _FACTORS:
            parameter = _parameter(module, modules, config, keymap)
            changes.adapted[parameter] = _adapted(module, parameter, config, keymap)
    return changes


@dataclass(frozen=True)
class ModuleFactors:
    """The tensors of one module whose product is added to its parameter; all of them belong to the configuration."""

    lora_A: TensorInfo
    lora_B: TensorInfo
    lora_E: TensorInfo | None
    magnitude: TensorInfo | None
    embedding: bool

    @property
    def factors(self) -> list[TensorInfo]:
        """What is multiplied: if one of them is zero, the product is."""
        return [factor for factor in (self.lora_A, self.lora_B, self.lora_E) if factor]

    @property
    def product(self) -> Shape:
        """Shape of lora_B · lora_A."""
        return self.lora_B.shape[0], *self.lora_A.shape[1:]


def find_factors(module: AdaptedModule, config: AdapterConfig) -> ModuleFactors:
    """The factors of a module that has some; KeyMismatch if one is missing or does not belong to `config`."""
    embedding = bool(module.roles.keys() & {"embedding_A", "embedding_B"})
    if not embedding and module.path.rpartition(".")[2] in EMBEDDINGS:
        raise KeyMismatch(f"{module.path} is an embedding, whose factors have other names and another layout")
    names = ("embedding_A", "embedding_B") if embedding else ("lora_A", "lora_B")
    more = (["lora_E"] if config.init_r else []) + (["magnitude"] if config.use_dora else [])
    roles = require(module, *names, *more)
    if surplus := sorted(roles.keys() - {*names, *more, "lora_bias"}):
        raise KeyMismatch(f"{roles[surplus[0]].name} does not belong to an adapter of this configuration")
    lora_E = roles["lora_E"] if config.init_r else None
    magnitude = roles["magnitude"] if config.use_dora else None
    found = ModuleFactors(roles[names[0]], roles[names[1]], lora_E, magnitude, embedding)
    if magnitude and prod(magnitude.shape) != found.product[0]:
        raise ShapeMismatch(f"{magnitude.name} has shape {list(magnitude.shape)}, not {found.product[0]} numbers")
    return found


def _adapted(module: AdaptedModule, parameter: str, config: AdapterConfig, keymap: Keymap) -> Adapted:
    path = module.path
    found = find_factors(module, config)
    targeted = bool(targeted_parameters(path, config))
    experts = _experts(path, parameter, keymap) if targeted else None
    key = parameter if targeted else path
    check_ranks(found.lora_A, found.lora_B, found.lora_E, config.rank_for(key), experts or 1)
    product = found.product
    transposed = found.embedding or path in keymap.conv1d
    if experts:
        transposed = _is_transposed(parameter, product, config, keymap)
    term = LowRank(
        lora_A=found.lora_A.name,
        lora_B=found.lora_B.name,
        lora_E=found.lora_E.name if found.lora_E else None,
        scaling=config.scaling_for(key),
        transposed=transposed,
    )
    return Adapted(
        term=term,
        product=product[::-1] if transposed else product,
        r=found.lora_A.shape[0],
        experts=experts,
        magnitude=found.magnitude,
    )


def check_ranks(lora_A: TensorInfo, lora_B: TensorInfo, lora_E: TensorInfo | None, r: int | None, times: int) -> None:
    """ShapeMismatch unless the factors of one module have the rank `times` · r; r is free where it is None."""
    found = lora_A.shape[0] if lora_A.shape else 0
    expected = found if r is None else r * times
    for tensor, axis in ((lora_A, 0), (lora_B, 1)):
        if len(tensor.shape) < 2 or tensor.shape[axis] != expected or 0 in tensor.shape[1 - axis :: 2]:
            raise ShapeMismatch(f"{tensor.name} has shape {list(tensor.shape)}; axis {axis} should be r = {expected}")
    if prod(lora_B.shape[2:]) != 1:
        raise ShapeMismatch(f"{lora_B.name} has shape {list(lora_B.shape)}, not [out, r] or [out, r, 1, 1]")
    if lora_E and prod(lora_E.shape) != expected:
        raise ShapeMismatch(f"{lora_E.name} has shape {list(lora_E.shape)}, not {expected} numbers")


def targeted_parameters(path: str, config: AdapterConfig) -> list[str]:
    """Names in `target_parameters` that may be parameters of the module `path`."""
    split = [target.rpartition(".") for target in config.target_parameters]
    return sorted({name for module, _, name in split if matches(path, module)})


def _parameter(module: AdaptedModule, modules: list[AdaptedModule], config: AdapterConfig, keymap: Keymap) -> str:
    """The parameter that a module's factors adapt. Which of several is not in their names, but in how often PEFT
    wrapped the module: once for each, in the model's order, so that the first has most wrappers around it."""
    path = module.path
    names = targeted_parameters(path, config)
    if not names:
        return f"{path}.weight"
    if keymap.inferred and (len(names) > 1 or len(keymap.shapes[f"{path}.{names[0]}"]) > 2):
        raise KeyMismatch(f"{path}: parameters of experts can be matched only by a key map made with transformers")
    found = [name for name in keymap.parameters_of(path) if name.rpartition(".")[2] in names]
    depths = sorted(other.depth for other in modules if other.path == path and other.roles.keys() & _FACTORS)
    if depths != list(range(len(found))):
        raise KeyMismatch(f"{path} has {len(found)} of the target_parameters and {len(depths)} pairs of factors")
    return found[-1 - module.depth]


def _experts(path: str, parameter: str, keymap: Keymap) -> int | None:
    shape = keymap.shapes[parameter]
    if len(shape) != 3:
        return None
    if path not in keymap.experts:
        raise KeyMismatch(f"{path} is not a module of experts")
    return shape[0]


def _is_transposed(parameter: str, product: Shape, config: AdapterConfig, keymap: Keymap) -> bool:
    """Whether an expert's matrix is (lora_B·lora_A)ᵀ. The shapes tell, unless both ways fit.

    PEFT before 0.19 took every such parameter for (experts, in, out), 0.19.0 for (experts, out, in), and since then
    it asks the module.
    """
    shape = keymap.shapes[parameter][1:]
    if product != product[::-1]:
        return product[::-1] == shape
    if config.peft_version < _SWAPPED_SINCE:
        return True
    stored_transposed = keymap.experts[parameter.rpartition(".")[0]]
    return stored_transposed and config.peft_version >= _SWAPPED_UNLESS_TRANSPOSED_SINCE


def token_indices(path: str, new_rows: TensorInfo, config: AdapterConfig) -> tuple[int, ...]:
    """Which rows of the module's parameter `new_rows` are; KeyMismatch if the configuration does not say."""
    found = [indices for name, indices in config.trainable_token_indices.items() if not name or matches(path, name)]
    if len(found) != 1 or len(found[0]) != new_rows.shape[0]:
        raise KeyMismatch(f"{new_rows.name} does not fit trainable_token_indices of the config")
    return found[0]


def is_announced(path: str, name: str, config: AdapterConfig) -> bool:
    """Whether a parameter stored whole is one that the config says was trained. Others PEFT would ignore, except
    input and output layer: it stores them unasked when the vocabulary was resized."""
    if saved_module(path, config.modules_to_save) or (name == "bias" and config.bias != "none"):
        return True
    if path.rpartition(".")[2] not in (*EMBEDDINGS, *OUTPUT_LAYERS):
        raise KeyMismatch(f"{path}.{name} is stored whole, but is not in modules_to_save")
    return False
