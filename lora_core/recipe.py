"""What every tensor of a merged checkpoint is made of: plain data, from headers alone, to be stored and sent."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, Literal, Self

from lora_core import strict_json
from lora_core.errors import BadRecipe
from lora_core.floats import FLOATS

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One term, scaling · lora_B · lora_A, added to rows of an output tensor.

    `lora_A` is read as (r, in) and `lora_B` as (out, r). AdaLoRA scales the rows of lora_A by `lora_E`. Without a
    `lora_A` the term is scaling · lora_B, a column. With `expert` = (e, n), the factors hold those of n experts and
    e's are meant. `transposed` turns the product to (in, out). Of the product, `rows` = (begin, end) are taken, all
    if None, and added from row `first` of the output on.
    """

    lora_A: str | None
    lora_B: str
    scaling: float
    lora_E: str | None = None
    expert: tuple[int, int] | None = None
    transposed: bool = False
    rows: tuple[int, int] | None = None
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class TensorRecipe:
    """One output tensor: what it starts from, and what is done to it, in this order.

    Start: the base tensor `base`, as it is or as 4-bit numbers leave it (`quantised`, lora_core.nf4), or, if `base` is
    None, the adapter tensor `replaced_by`. Then `new_rows`, an
    adapter tensor, replaces the rows `row_indices`; then the `terms` are added; then, with `magnitude`, each row
    (each column, if `magnitude_of_columns`) is scaled to the norm that this adapter tensor gives (DoRA,
    arXiv:2402.09353). Arithmetic sees the tensor as a matrix with `columns` columns.
    """

    base: str | None
    dtype: str
    shape: tuple[int, ...]
    columns: int
    quantised: Literal["nf4"] | None = None
    replaced_by: str | None = None
    new_rows: str | None = None
    row_indices: tuple[int, ...] = ()
    terms: tuple[LowRank, ...] = ()
    magnitude: str | None = None
    magnitude_of_columns: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether the numbers are those of `base`, under this or another name."""
        return self.base is not None and not (self.quantised or self.new_rows or self.terms or self.magnitude)

    def adapter_tensors(self) -> set[str]:
        """Names of all adapter tensors this one needs."""
        names = {self.replaced_by, self.new_rows, self.magnitude}
        for term in self.terms:
            names |= {term.lora_A, term.lora_B, term.lora_E}
        return {name for name in names if name is not None}


@dataclass(frozen=True)
class Recipe:
    """`tensors` maps output names to how they come about; all other tensors of the base are copied as they are.

    A name that the base has not is an additional output: it goes into the shard of its `base` tensor.
    `config_changes` are fields of config.json with their new values.
    """

    tensors: Mapping[str, TensorRecipe]
    config_changes: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Equal recipes give equal bytes."""
        tensors = {name: _without_defaults(asdict(tensor)) for name, tensor in self.tensors.items()}
        document = {"format": FORMAT, "tensors": tensors, "config_changes": self.config_changes}
        return json.dumps(document, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Parse what `to_json` wrote. Anything else is BadRecipe."""
        try:
            document = strict_json.loads(data)
            if document["format"] != FORMAT or document.keys() != {"format", "tensors", "config_changes"}:
                raise BadRecipe(f"this is not a merge recipe of format {FORMAT}")
            tensors = {name: _tensor(value) for name, value in document["tensors"].items()}
            return cls(tensors, dict(document["config_changes"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadRecipe(f"this is not a merge recipe: {error}") from None


_DEFAULTS = {item.name: item.default for kind in (LowRank, TensorRecipe) for item in fields(kind)}


def _without_defaults(value: dict[str, Any]) -> dict[str, Any]:
    kept = {name: item for name, item in value.items() if item != _DEFAULTS[name]}
    return kept | ({"terms": [_without_defaults(term) for term in kept["terms"]]} if "terms" in kept else {})


def _tensor(value: dict[str, Any]) -> TensorRecipe:
    value = dict(value)
    terms = tuple(_term(term) for term in value.pop("terms", ()))
    tensor = TensorRecipe(**_tuples({"base": None} | value), terms=terms)
    names = (tensor.base, tensor.replaced_by, tensor.new_rows, tensor.magnitude)
    _expect(all(name is None or isinstance(name, str) for name in names))
    _expect((tensor.base is None) == (tensor.replaced_by is not None))
    _expect(tensor.quantised is None or (tensor.quantised == "nf4" and tensor.base is not None))
    _expect(tensor.dtype in FLOATS and isinstance(tensor.magnitude_of_columns, bool))
    _expect(_naturals(tensor.shape) and type(tensor.columns) is int and tensor.columns > 0)
    rows, rest = divmod(prod(tensor.shape), tensor.columns)
    _expect(rest == 0 and _naturals(tensor.row_indices) and all(row < rows for row in tensor.row_indices))
    _expect(bool(tensor.row_indices) == (tensor.new_rows is not None))
    return tensor


def _term(value: dict[str, Any]) -> LowRank:
    term = LowRank(**_tuples(value))
    _expect(all(name is None or isinstance(name, str) for name in (term.lora_A, term.lora_E)))
    _expect(isinstance(term.lora_B, str) and isinstance(term.transposed, bool))
    _expect(type(term.scaling) in (int, float) and _naturals((term.first,)))
    for pair in (term.expert, term.rows):
        _expect(pair is None or (_naturals(pair) and len(pair) == 2 and pair[0] < pair[1]))
    return term


def _expect(condition: bool) -> None:  # noqa: FBT001  reads as a sentence
    if not condition:
        raise BadRecipe("a tensor of the recipe has a field of the wrong kind")


def _naturals(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
