"""Where the parameters of a model lie in its checkpoint: a plain table, to be stored beside a base.

`lora_core.keymap_torch.build_keymap` makes it with transformers, which knows how it loads each family. `infer_keymap`
does without, for families whose checkpoints use the names of the model but for a prefix.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from lora_core import strict_json
from lora_core.errors import BadRecipe, KeyMismatch
from lora_core.header import TensorInfo

FORMAT = 1
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
OUTPUT_LAYERS = ("lm_head", "embed_out")
# transformers' Conv1D, a linear layer whose matrix is stored as (in, out): in these families, under these names.
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = ("c_attn", "q_attn", "c_proj", "c_fc")
# Ways in which a checkpoint's names differ from the model's: with or without the trunk's own name.
_PREFIXES = ("", "model.", "transformer.", "gpt_neox.")


def is_conv1d(family: Any, name: str) -> bool:
    """Whether the layer of this last name is a Conv1D in models of this family (config.json's model_type)."""
    return family in _CONV1D_FAMILIES and name in _CONV1D_NAMES


@dataclass(frozen=True, kw_only=True)
class Place:
    """A part of a parameter and where it lies: rows `rows` (begin, end) of the parameter, all if None, or of the
    expert `expert` of a parameter with one matrix per expert, are the rows of `tensor` from `first` on; all of
    `tensor`, and turned, if `transposed`.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    first: int = 0
    transposed: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether tensor and parameter are the same thing."""
        return self == Place(tensor=self.tensor)


@dataclass(frozen=True, kw_only=True)
class Keymap:
    """`places` and `shapes` of parameters, in the model's order. `conv1d` modules store (in, out).

    `tied`: parameters that share another's tensor by configuration; without a place of their own, they have none in
    the checkpoint, and `new_names` says how it would be called. `opaque` parameters are computed from the checkpoint
    in a way that is not followed here; the value says which. `experts` are modules whose parameters hold a matrix per
    expert, with whether that is (in, out). `linear` are weights of linear layers but the output layer. `inferred`: from
    names alone, which tell nothing of experts or of layers.
    """

    places: Mapping[str, tuple[Place, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    conv1d: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    new_names: Mapping[str, str] = field(default_factory=dict)
    opaque: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, bool] = field(default_factory=dict)
    linear: frozenset[str] = frozenset()
    inferred: bool = False

    def parameters_of(self, module: str) -> list[str]:
        """Names of the parameters of one module, in the order in which the model has them."""
        return [name for name in self.places if name.rpartition(".")[0] == module]

    def to_json(self) -> bytes:
        """Equal keymaps give equal bytes."""
        places = {name: [_compact(place) for place in found] for name, found in self.places.items()}
        document: dict[str, Any] = {
            name: dict(getattr(self, name)) for name in ("shapes", "tied", "new_names", "opaque", "experts")
        }
        document |= {"format": FORMAT, "places": places, "inferred": self.inferred}
        document |= {"conv1d": sorted(self.conv1d), "linear": sorted(self.linear)}
        # the order of parameters means something, so that they are not sorted
        return json.dumps(document, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Parse what `to_json` wrote. Anything else is BadRecipe."""
        try:
            document = strict_json.loads(data)
            if document.pop("format") != FORMAT:
                raise BadRecipe(f"this is not a key map of format {FORMAT}")
            document["places"] = {name: tuple(map(_place, found)) for name, found in document["places"].items()}
            document["shapes"] = {name: tuple(shape) for name, shape in document["shapes"].items()}
            return cls(**document | {name: frozenset(document[name]) for name in ("conv1d", "linear")})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadRecipe(f"this is not a key map: {error}") from None


def infer_keymap(
    parameters: Iterable[str], tensors: Mapping[str, TensorInfo], base_config: Mapping[str, Any], *, transposed: bool
) -> Keymap:
    """A keymap of `parameters` by name. Exactly one prefix must fit all of them, else KeyMismatch.

    `transposed` is the adapter's own word on whether matrices are (in, out), for families unknown here.
    """
    wanted = sorted(set(parameters))
    embeddings = sorted(name for name in tensors if _last(name) in EMBEDDINGS)
    own = [name for name in tensors if _last(name) in OUTPUT_LAYERS]
    tied: list[str] = []
    if len(embeddings) == 1 and (not own or base_config.get("tie_word_embeddings") is True):
        tied = own or [name for name in wanted if _last(name) in OUTPUT_LAYERS] or ["lm_head.weight"]
    names = checkpoint_names([name for name in wanted if name in tensors or name not in tied], tensors)
    if tied:
        # by the model's own name if the adapter uses it, else by the checkpoint's
        source = next((name for name, tensor in names.items() if tensor in embeddings), embeddings[0])
        names |= {source: embeddings[0]} | {name: name for name in own}
    modules = {name.rpartition(".")[0] for name in names if len(tensors[names[name]].shape) == 2}
    return Keymap(
        places={name: (Place(tensor=tensor),) for name, tensor in names.items()},
        shapes={name: tensors[tensor].shape for name, tensor in names.items()},
        conv1d=frozenset(path for path in modules if _is_conv1d(path, base_config, transposed=transposed)),
        tied=dict.fromkeys(tied, source) if tied else {},
        new_names={name: name for name in tied},
        inferred=True,
    )


def checkpoint_names(parameters: list[str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Parameter → checkpoint tensor, one to one. Checkpoints differ in whether the trunk's prefix is written;
    exactly one way must fit all parameters."""
    ways: set[tuple[str, ...]] = set()
    missing = parameters
    for prefix in _PREFIXES:
        without = tuple(name.removeprefix(prefix) for name in parameters)
        for names in (without, tuple(prefix + name for name in parameters)):
            absent = [given for given, name in zip(parameters, names, strict=True) if name not in tensors]
            if not absent and len(set(names)) == len(names):
                ways.add(names)
            elif len(absent) < len(missing):
                missing = absent
    if len(ways) > 1:
        raise KeyMismatch(f"{parameters[0]} fits more than one tensor of the base, with and without a prefix")
    if not ways:
        raise KeyMismatch(f"the base has no tensor for {', '.join(missing[:5])}", missing=missing)
    return dict(zip(parameters, ways.pop(), strict=True))


def _is_conv1d(path: str, base_config: Mapping[str, Any], *, transposed: bool) -> bool:
    family = base_config.get("model_type")
    name = path.rpartition(".")[2]
    return is_conv1d(family, name) or (transposed and family is None and name not in (*OUTPUT_LAYERS, *EMBEDDINGS))


def _last(parameter: str) -> str:
    """The module's own name: model.embed_tokens.weight → embed_tokens."""
    return parameter.rpartition(".")[0].rpartition(".")[2]


_DEFAULTS = {item.name: item.default for item in fields(Place)}


def _compact(place: Place) -> str | dict[str, Any]:
    if place.is_whole:
        return place.tensor
    return {name: value for name, value in asdict(place).items() if value != _DEFAULTS[name]}


def _place(value: Any) -> Place:
    if isinstance(value, str):
        return Place(tensor=value)
    given: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    return Place(**given)
