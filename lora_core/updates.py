"""The arithmetic of a recipe: what is done to the rows of one tensor, in float64, block by block."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from lora_core.errors import BadAdapter, KeyMismatch, NonFinite
from lora_core.floats import FLOATS, Array, widen
from lora_core.header import ITEM_BYTES, Header, TensorInfo
from lora_core.recipe import LowRank, TensorRecipe

# Products of at most so many multiplications stay on the calling thread in OpenBLAS. Its threads beside ours, on
# the same cores, wait for each other: a merge took 50 times as long.
_TILE_MULTIPLICATIONS = 2**18
_PREPARED_ROWS = 256

ReadRows = Callable[[int, int], Array]


class Update(Protocol):
    """What happens to one tensor, seen as a matrix of the recipe's `columns`. Threads may share it.

    `squared_norm` is the sum of the squares of what is added, or None where that depends on the base.
    """

    @property
    def squared_norm(self) -> float | None: ...

    def prepare(self, read_rows: ReadRows) -> None:
        """Look at the base once before the first `apply`: `read_rows(begin, end)` gives its rows as fresh float64."""

    def apply(self, values: Array, first_row: int) -> None:
        """Turn `values`, the base's rows from `first_row` on in float64 (rows, columns), into the result, in place.

        Where the recipe has no base tensor, what `values` held does not matter.
        """


class AdapterReader:
    """Tensors of an adapter file as float64. `read(offset, size)` gives bytes of the file as a uint8 array."""

    def __init__(self, header: Header, read: Callable[[int, int], Array]) -> None:
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._data_start = header.data_start
        self._read = read

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def matrix(self, name: str, rows: int) -> Array:
        """The whole tensor in `rows` rows."""
        tensor = self._find(name)
        return self._numbers(tensor, 0, prod(tensor.shape)).reshape(rows, -1)

    def rows(self, name: str, begin: int, end: int, columns: int) -> Array:
        """Rows of the tensor, seen as a matrix with `columns` columns. NaN and infinity are NonFinite."""
        return self._numbers(self._find(name), begin * columns, end * columns).reshape(end - begin, columns)

    def _numbers(self, tensor: TensorInfo, begin: int, end: int) -> Array:
        size = ITEM_BYTES[tensor.dtype]
        raw = self._read(self._data_start + tensor.begin + begin * size, (end - begin) * size)
        values = widen(raw, tensor.dtype)
        if not np.isfinite(values).all():
            raise NonFinite(f"{tensor.name} holds NaN or infinity", tensor=tensor.name)
        return values

    def _find(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise KeyMismatch(f"the adapter lacks {name}", missing=[name])
        tensor = self._tensors[name]
        if tensor.dtype not in FLOATS:
            raise BadAdapter(f"{name} has the dtype {tensor.dtype}, which is not a float")
        return tensor


def load_update(tensor: TensorRecipe, adapter: AdapterReader) -> Update:
    """Read what `tensor` needs of the adapter: factors at once, whole replacements only as they are used."""
    low_rank = _LowRankSum([_load_term(term, adapter) for term in tensor.terms])
    if tensor.magnitude is not None:
        return _Magnitude(tensor, low_rank, adapter.matrix(tensor.magnitude, 1)[0])
    if tensor.base is None or tensor.new_rows is not None:
        return _Replacement(tensor, low_rank, adapter)
    return low_rank


@dataclass(frozen=True)
class _Term:
    """left (rows, r) · right (r, columns), added from row `first` on."""

    left: Array
    right: Array
    first: int

    @property
    def squared_norm(self) -> float:
        """Σ (left·right)², by r × r products alone."""
        return float(np.einsum("ij,ij", _gram(self.left.T), _gram(self.right)))


class _LowRankSum:
    """Terms that share no row."""

    def __init__(self, terms: list[_Term]) -> None:
        self._terms = terms
        self.squared_norm = sum(term.squared_norm for term in terms)

    def prepare(self, read_rows: ReadRows) -> None:
        """Nothing: every row stands for itself."""

    def apply(self, values: Array, first_row: int) -> None:
        last_row = first_row + len(values)
        for term in self._terms:
            begin, end = max(first_row, term.first), min(last_row, term.first + len(term.left))
            if begin < end:
                add_product(
                    values[begin - first_row : end - first_row],
                    term.left[begin - term.first : end - term.first],
                    term.right,
                )


class _Replacement:
    """Rows that come from the adapter, all or some, and terms added to the result."""

    squared_norm = None

    def __init__(self, tensor: TensorRecipe, low_rank: _LowRankSum, adapter: AdapterReader) -> None:
        self._tensor, self._low_rank, self._adapter = tensor, low_rank, adapter
        self._row_of = {row: position for position, row in enumerate(tensor.row_indices)}

    def prepare(self, read_rows: ReadRows) -> None:
        """Nothing: every row stands for itself."""

    def apply(self, values: Array, first_row: int) -> None:
        columns = self._tensor.columns
        if self._tensor.replaced_by is not None:
            values[:] = self._adapter.rows(self._tensor.replaced_by, first_row, first_row + len(values), columns)
        if self._tensor.new_rows is not None:
            for row in range(first_row, first_row + len(values)):
                if (position := self._row_of.get(row)) is not None:
                    values[row - first_row] = self._adapter.rows(self._tensor.new_rows, position, position + 1, columns)
        self._low_rank.apply(values, first_row)


class _Magnitude:
    """DoRA: m/‖V‖ · V with V = W + ΔW, the norm over each row of V, or over each column."""

    squared_norm = None

    def __init__(self, tensor: TensorRecipe, low_rank: _LowRankSum, magnitude: Array) -> None:
        self._low_rank, self._magnitude = low_rank, magnitude
        self._rows, self._columns = prod(tensor.shape) // tensor.columns, tensor.columns
        self._of_columns = tensor.magnitude_of_columns
        self._factors = np.full(self._columns, np.nan)  # until prepared

    def prepare(self, read_rows: ReadRows) -> None:
        """The norms of columns need every row."""
        if not self._of_columns:
            return
        squares = np.zeros(self._columns)
        for begin in range(0, self._rows, _PREPARED_ROWS):
            block = read_rows(begin, min(begin + _PREPARED_ROWS, self._rows))
            self._low_rank.apply(block, begin)
            squares += np.einsum("ij,ij->j", block, block)
        self._factors = _ratio(self._magnitude, squares)

    def apply(self, values: Array, first_row: int) -> None:
        self._low_rank.apply(values, first_row)
        if self._of_columns:
            values *= self._factors
        else:
            squares = np.einsum("ij,ij->i", values, values)
            values *= _ratio(self._magnitude[first_row : first_row + len(values)], squares)[:, None]


def add_product(values: Array, left: Array, right: Array) -> None:
    """values += left · right, on the calling thread, in tiles that stay in its cache."""
    rows, r = left.shape
    columns = right.shape[1]
    step = max(_TILE_MULTIPLICATIONS // max(rows * r, 1), 1)
    for begin in range(0, columns, step):
        values[:, begin : begin + step] += np.matmul(left, right[:, begin : begin + step])


def _load_term(term: LowRank, adapter: AdapterReader) -> _Term:
    lora_B = adapter.matrix(term.lora_B, adapter.shape(term.lora_B)[0])
    lora_A = np.ones((1, 1))
    if term.lora_A is not None:
        lora_A = adapter.matrix(term.lora_A, adapter.shape(term.lora_A)[0])
    if term.expert:
        expert, experts = term.expert
        # lora_A holds expert after expert; in lora_B's columns the expert changes fastest
        lora_A = lora_A.reshape(experts, -1, lora_A.shape[1])[expert]
        lora_B = lora_B[:, expert::experts]
    if term.lora_E is not None:
        lora_A = lora_A * adapter.matrix(term.lora_E, len(lora_A))
    left, right = lora_B * term.scaling, lora_A
    if term.transposed:
        left, right = right.T, left.T
    if term.rows:
        left = left[term.rows[0] : term.rows[1]]
    return _Term(np.ascontiguousarray(left), np.ascontiguousarray(right), term.first)


def _gram(rows: Array) -> Array:
    """rows · rowsᵀ in steps small enough for the calling thread."""
    result = np.zeros((len(rows), len(rows)))
    step = max(_TILE_MULTIPLICATIONS // max(len(rows) ** 2, 1), 1)
    for begin in range(0, rows.shape[1], step):
        part = np.ascontiguousarray(rows[:, begin : begin + step])
        result += part @ part.T
    return result


def _ratio(magnitude: Array, squares: Array) -> Array:
    """m/‖v‖; a row of zeros has no direction, and the merge fails on the infinity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return magnitude / np.sqrt(squares)
