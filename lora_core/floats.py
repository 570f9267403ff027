"""Between raw checkpoint bytes and float64: widening is exact, narrowing rounds once, to nearest even.

And what rounding did to a change, in sums that add up over the rows of a tensor."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NATIVE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
}
FLOATS = frozenset({*_NATIVE, "BF16"})
# What holds the bits of a number, and those of infinity; NaN lies above.
_BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
_INFINITY = {"F64": 0x7FF << 52, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
_FEW = 64


def widen(raw: Array, dtype: str) -> Array:
    """uint8 bytes of `dtype` numbers → fresh float64, exact."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return _numbers(raw, dtype, np.empty(raw.size // 2, np.uint32)).astype(np.float64)


@dataclass
class Sums:
    """Over `items` numbers: squares of W, of the change Δ, and of what rounding added to it; the product of the last
    two; and how many are not those of W."""

    weight: float = 0.0
    delta: float = 0.0
    lost: float = 0.0
    cross: float = 0.0
    changed: int = 0
    items: int = 0

    def add(self, other: "Sums") -> None:
        self.weight += other.weight
        self.delta += other.delta
        self.lost += other.lost
        self.cross += other.cross
        self.changed += other.changed
        self.items += other.items


def compare(before: Array, exact: Array, after: Array) -> Sums:
    """The sums of flat float64 arrays: W, W + Δ, and what that was rounded to."""
    delta, lost = exact - before, after - exact
    products = [(before, before), (delta, delta), (lost, lost), (delta, lost)]
    weight_squares, delta_squares, lost_squares, cross = (float(np.einsum("i,i", *pair)) for pair in products)
    changed = int(np.count_nonzero(before != after))
    return Sums(weight_squares, delta_squares, lost_squares, cross, changed, before.size)


class Scratch:
    """Buffers for `size` numbers, used again and again: fresh memory would cost more than the arithmetic."""

    def __init__(self, size: int) -> None:
        self.values, self.product = np.empty(size, np.float64), np.empty(size, np.float64)
        self._raw = np.empty(0, np.uint8)
        self._bits, self._low = np.empty(size, np.uint32), np.empty(size, np.uint16)
        self._marks = bytearray(size)  # which can be searched in place
        self._flags = np.frombuffer(self._marks, np.bool_)

    def buffer(self, size: int) -> Array:
        """`size` bytes to read into."""
        if self._raw.size < size:
            self._raw = np.empty(size, np.uint8)
        return self._raw[:size]

    def widen(self, raw: Array, dtype: str, out: Array) -> None:
        """uint8 bytes of `dtype` numbers → `out`, as many float64, exact; every NaN is the same one there."""
        with np.errstate(invalid="ignore"):  # a signalling NaN
            np.copyto(out, _numbers(raw, dtype, self._bits))
        if dtype != "BF16" and not are_finite(raw, dtype):
            out[np.isnan(out)] = np.nan

    def narrow(self, values: Array, dtype: str, out: Array) -> bool:
        """float64 → `out`, uint8 bytes of `dtype` numbers, each the nearest one, ties to even.

        False if one is infinite then, or NaN.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            if dtype == "BF16":
                self._bfloat16(values, out.view(np.uint16))
            else:
                np.copyto(out.view(_NATIVE[dtype]), values, casting="same_kind")
        return are_finite(out, dtype)

    def _bfloat16(self, values: Array, out: Array) -> None:
        """By way of float32, without the error of rounding twice.

        Rounding halves up is right but for a float32 that lies exactly between two bfloat16 numbers: there the exact
        value decides, and where it lies there too, the even neighbour is taken. Adding to the bits of a NaN leaves it
        one, unless all its bits are set.
        """
        bits, low, flags = (part[: values.size] for part in (self._bits, self._low, self._flags))
        singles = bits.view(np.float32)
        np.copyto(singles, values, casting="same_kind")
        np.copyto(low, bits, casting="unsafe")  # the lower half
        np.equal(low, 0x8000, out=flags)
        self._lower_ties(values, singles, bits)
        np.add(bits, 0x8000, out=bits)
        np.right_shift(bits, 16, out=bits)
        np.copyto(out, bits, casting="unsafe")

    def _lower_ties(self, values: Array, singles: Array, bits: Array) -> None:
        """Take one from the bits of those flagged that are not to be rounded up. Four of a block, mostly: numpy's ways
        with so few take ten times as long."""
        found, position = 0, self._marks.find(1, 0, values.size)
        while position >= 0 and found < _FEW:
            found += 1
            if not _is_above(abs(values.item(position)), abs(singles.item(position)), bits.item(position)):
                bits[position] -= 1
            position = self._marks.find(1, position + 1, values.size)
        if position >= 0:
            rest = position + np.flatnonzero(self._flags[position : values.size])
            above = _is_above(np.abs(values[rest]), np.abs(singles[rest]), bits[rest])
            bits[rest] -= np.logical_not(above)


def _is_above(exact: Any, middle: Any, bits: Any) -> Any:
    """Whether `exact` is nearer to the larger of the bfloat16 numbers around `middle`, a float32 with these `bits`, or
    as near to both and that one is even. Of numbers or arrays."""
    return (exact > middle) | ((exact == middle) & ((bits >> 16 & 1) == 1))


def are_finite(raw: Array, dtype: str) -> bool:
    """Whether no number of the uint8 bytes is infinite or NaN."""
    infinity, bits = _INFINITY[dtype], raw.view(_BITS[dtype])
    sign = 1 << (8 * bits.itemsize - 1)
    largest, largest_negative = bits.view(f"i{bits.itemsize}").max(initial=0), bits.max(initial=0)
    return bool(largest < infinity and largest_negative < infinity | sign)


def _numbers(raw: Array, dtype: str, bits: Array) -> Array:
    """A view of `raw` as numbers that numpy knows; bfloat16, the upper half of a float32, takes shape in `bits`."""
    if dtype != "BF16":
        return raw.view(_NATIVE[dtype])
    half = raw.view(np.uint16)
    bits = bits[: half.size]
    np.copyto(bits, half)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)
