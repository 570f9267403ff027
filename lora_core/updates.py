"""The arithmetic of a recipe: what is done to the rows of one tensor, in float64, block by block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from lora_core import nf4
from lora_core.errors import BadAdapter, KeyMismatch, NonFinite
from lora_core.floats import FLOATS, Array, widen
from lora_core.header import ITEM_BYTES, Header, TensorInfo
from lora_core.product import TILE_MULTIPLICATIONS, add_product
from lora_core.recipe import LowRank, TensorRecipe

_PREPARED_ROWS = 256
_RECENT = 3

ReadRows = Callable[[int, int], Array]


class Update(Protocol):
    """What happens to one tensor, seen as a matrix of the recipe's `columns`. Threads may share it.

    `squared_norm` is the sum of the squares of what is added, or None where that depends on the base.
    """

    @property
    def squared_norm(self) -> float | None: ...

    def prepare(self, read_rows: ReadRows) -> None:
        """Look at the base once before the first `apply`: `read_rows(begin, end)` gives its rows as fresh float64."""

    def apply(self, values: Array, first_row: int, scratch: Array | None = None) -> None:
        """Turn `values`, the base's rows from `first_row` on in float64 (rows, columns), into the result, in place.

        Where the recipe has no base tensor, what `values` held does not matter. `scratch`: as many float64 to use.
        """


class AdapterReader:
    """Tensors of an adapter file as float64. `read(offset, size)` gives bytes of the file as a uint8 array."""

    def __init__(self, header: Header, read: Callable[[int, int], Array]) -> None:
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._data_start = header.data_start
        self._read = read
        self._recent: list[tuple[str, Array]] = []  # factors of experts serve one tensor after another

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def matrix(self, name: str, rows: int) -> Array:
        """The whole tensor in `rows` rows; not to be written to."""
        found = next((values for recent, values in self._recent if recent == name), None)
        if found is None:
            tensor = self._find(name)
            found = self._numbers(tensor, 0, prod(tensor.shape))
            self._recent = [*self._recent[1 - _RECENT :], (name, found)]
        return found.reshape(rows, -1)

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
    """Read the factors that `tensor` needs of the adapter; whole replacements are read as they are used."""
    return _Update(tensor, [_load_term(term, adapter) for term in tensor.terms], adapter)


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


class _Update:
    """The steps of a TensorRecipe, in its order."""

    def __init__(self, tensor: TensorRecipe, terms: list[_Term], adapter: AdapterReader) -> None:
        self._tensor, self._terms, self._adapter = tensor, terms, adapter
        self._row_of = {row: position for position, row in enumerate(tensor.row_indices)}
        self._magnitude = adapter.matrix(tensor.magnitude, 1)[0] if tensor.magnitude else None
        self._column_factors = np.full(tensor.columns, np.nan)  # until prepared
        self._maxima = self._stored_maxima = np.empty(0, np.float32)

    @property
    def squared_norm(self) -> float | None:
        tensor = self._tensor
        only_terms = tensor.base and not (tensor.quantised or tensor.new_rows or tensor.magnitude)
        return sum(term.squared_norm for term in self._terms) if only_terms else None

    def prepare(self, read_rows: ReadRows) -> None:
        """The norms of columns and the maxima of 4-bit blocks need every row; all else stands for itself."""
        if self._tensor.quantised:
            self._maxima = np.concatenate([nf4.block_maxima(block) for _, block in self._blocks(read_rows)])
            self._stored_maxima = nf4.stored_maxima(self._maxima)
        if self._magnitude is not None and self._tensor.magnitude_of_columns:
            squares = np.zeros(self._tensor.columns)
            for first_row, block in self._blocks(read_rows):
                self._add(block, first_row, np.empty(block.size))
                squares += np.einsum("ij,ij->j", block, block)
            self._column_factors = _ratio(self._magnitude, squares)

    def _blocks(self, read_rows: ReadRows) -> Iterator[tuple[int, Array]]:
        columns = self._tensor.columns
        rows = prod(self._tensor.shape) // columns
        for begin in range(0, rows, _PREPARED_ROWS):
            end = min(begin + _PREPARED_ROWS, rows)
            yield begin, read_rows(begin, end) if self._tensor.base else np.empty((end - begin, columns))

    def apply(self, values: Array, first_row: int, scratch: Array | None = None) -> None:
        self._add(values, first_row, np.empty(values.size) if scratch is None else scratch)
        if self._magnitude is None:
            return
        if self._tensor.magnitude_of_columns:
            values *= self._column_factors
        else:
            magnitude = self._magnitude[first_row : first_row + len(values)]
            values *= _ratio(magnitude, np.einsum("ij,ij->i", values, values))[:, None]

    def _add(self, values: Array, first_row: int, scratch: Array) -> None:
        """Everything but the magnitude."""
        last_row, columns = first_row + len(values), self._tensor.columns
        if self._tensor.quantised:
            self._quantise(values, first_row)
        if self._tensor.replaced_by:
            values[:] = self._adapter.rows(self._tensor.replaced_by, first_row, last_row, columns)
        for row in range(first_row, last_row) if self._row_of else ():
            if (position := self._row_of.get(row)) is not None and self._tensor.new_rows:
                values[row - first_row] = self._adapter.rows(self._tensor.new_rows, position, position + 1, columns)
        for term in self._terms:
            begin, end = max(first_row, term.first), min(last_row, term.first + len(term.left))
            if begin < end:
                left = term.left[begin - term.first : end - term.first]
                add_product(values[begin - first_row : end - first_row], left, term.right, scratch)

    def _quantise(self, values: Array, first_row: int) -> None:
        """To 4 bits and back, to the dtype in which the base is stored and training computed."""
        per_row = self._tensor.columns // nf4.BLOCK
        blocks = slice(first_row * per_row, (first_row + len(values)) * per_row)
        left = nf4.round_trip(values, self._maxima[blocks], self._stored_maxima[blocks])
        values[:] = nf4.to_dtype(left, self._tensor.dtype)


def _load_term(term: LowRank, adapter: AdapterReader) -> _Term:
    if term.lora_A is None:
        lora_A = np.ones((1, 1))
    elif term.expert is None:
        lora_A = adapter.matrix(term.lora_A, adapter.shape(term.lora_A)[0])
    else:  # lora_A holds expert after expert
        expert, experts = term.expert
        rows, columns = adapter.shape(term.lora_A)
        lora_A = adapter.rows(term.lora_A, expert * rows // experts, (expert + 1) * rows // experts, columns)
    lora_B = adapter.matrix(term.lora_B, adapter.shape(term.lora_B)[0])
    if term.expert is not None:  # in the columns of lora_B the expert changes fastest
        lora_B = lora_B[:, term.expert[0] :: term.expert[1]]
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
    step = max(TILE_MULTIPLICATIONS // max(len(rows) ** 2, 1), 1)
    for begin in range(0, rows.shape[1], step):
        part = np.ascontiguousarray(rows[:, begin : begin + step])
        result += part @ part.T
    return result


def _ratio(magnitude: Array, squares: Array) -> Array:
    """m/‖v‖; a row of zeros has no direction, and the merge fails on the infinity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return magnitude / np.sqrt(squares)
