"""Between raw checkpoint bytes and float64: widening is exact, narrowing rounds once, to nearest even.

And what rounding did to a change, in sums that add up over the blocks of a tensor."""

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
_HALVES = ("BF16", "F16")
# OpenBLAS starts threads of its own for longer ones.
_DOT_ITEMS = 8192
# (‖Δ‖/‖W‖)² from which float32 is good enough to see what became of Δ.
_VISIBLE = 1e-10


def widen(raw: Array, dtype: str) -> Array:
    """uint8 bytes of `dtype` numbers → fresh float64, exact."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return _numbers(raw, dtype, np.empty(raw.size // 2, np.uint32)).astype(np.float64)


@dataclass
class Sums:
    """Of W, of the change Δ, and of what rounding added to it: squares, the product of the last two, and how many
    elements have other bits than W."""

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


class Scratch:
    """Buffers for `size` numbers, used again and again: fresh memory would cost more than the arithmetic."""

    def __init__(self, size: int) -> None:
        self.values = np.empty(size, np.float64)
        self.raw = np.empty(0, np.uint8)
        self._bits, self._near, self._weight = (np.empty(size, np.uint32) for _ in range(3))
        self._flags = np.empty(size, np.bool_)

    def buffer(self, size: int) -> Array:
        """`size` bytes to read into."""
        if self.raw.size < size:
            self.raw = np.empty(size, np.uint8)
        return self.raw[:size]

    def widen(self, raw: Array, dtype: str, out: Array) -> Array:
        """uint8 bytes of `dtype` numbers → the first of `out` (float64), exact."""
        numbers = _numbers(raw, dtype, self._bits)
        with np.errstate(invalid="ignore"):  # a signalling NaN
            np.copyto(out[: numbers.size], numbers)
        return out[: numbers.size]

    def narrow(self, values: Array, dtype: str, before: tuple[Array, str] | None = None) -> tuple[Array, Sums]:
        """float64 → fresh uint8 bytes of `dtype` numbers, each the nearest one, ties to even.

        What does not fit becomes infinite, and a NaN any number: then, and only then, `lost` of the sums is not
        finite. With the bytes and dtype `before` the change, the sums are complete. Those between 16-bit numbers are
        good to six digits.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            near = self._near[: values.size].view(np.float32)
            np.copyto(near, values, casting="same_kind")
            data = self._bfloat16(values) if dtype == "BF16" else values.astype(_NATIVE[dtype])
            raw = data.view(np.uint8)
            if dtype in _HALVES and (before is None or before[1] in _HALVES):
                buffers = [part[: values.size].view(np.float32) for part in (self._bits, self._near, self._weight)]
                sums = self._compare(before, (raw, dtype), buffers)
                # else it may be that only the squares were too large, or the change too small for float32
                if np.isfinite(sums.lost) and (before is None or sums.delta > _VISIBLE * sums.weight):
                    return raw, sums
            doubles = [np.empty(values.size), values.copy(), np.empty(values.size)]
            return raw, self._compare(before, (raw, dtype), doubles)

    def _compare(self, before: tuple[Array, str] | None, after: tuple[Array, str], buffers: list[Array]) -> Sums:
        """`buffers`: one to use, the exact values, which are lost, and another to use, all of one float type."""
        lost, delta, weight = buffers
        sums = Sums(items=lost.size)
        _read(after, lost)
        np.subtract(lost, delta, out=lost)
        sums.lost = _dot(lost, lost)
        if before is None:
            return sums
        _read(before, weight)
        np.subtract(delta, weight, out=delta)
        sums.weight, sums.delta, sums.cross = _dot(weight, weight), _dot(delta, delta), _dot(delta, lost)
        flags = self._flags[: lost.size]
        if before[1] == after[1]:
            bits = np.dtype(f"u{after[0].size // lost.size}")
            np.not_equal(before[0].view(bits), after[0].view(bits), out=flags)
        else:
            _read(after, lost)
            np.not_equal(weight, lost, out=flags)
        sums.changed = int(np.count_nonzero(flags))
        return sums

    def _bfloat16(self, values: Array) -> Array:
        """By way of float32, which `near` holds already, without the error of rounding twice.

        Rounding halves up is right but for a float32 that lies exactly between two bfloat16 numbers: there the exact
        value decides, and where it lies there too, the even neighbour is taken.
        """
        near, bits, flags = (part[: values.size] for part in (self._near, self._bits, self._flags))
        np.bitwise_and(near, 0xFFFF, out=bits)
        np.equal(bits, 0x8000, out=flags)
        between = np.flatnonzero(flags)
        np.add(near, 0x8000, out=bits)
        np.right_shift(bits, 16, out=bits)
        result = bits.astype(np.uint16)
        if between.size:
            exact, moved = np.abs(values[between]), np.abs(near[between].view(np.float32)).astype(np.float64)
            low = near[between] >> 16
            up = (exact > moved) | ((exact == moved) & (low & 1 == 1))
            result[between] = (low + up).astype(np.uint16)
        return result


def _read(source: tuple[Array, str], out: Array) -> None:
    """Raw bytes → the float32 or float64 array `out`, exact."""
    raw, dtype = source
    if dtype == "BF16" and out.dtype == np.float32:
        _numbers(raw, dtype, out.view(np.uint32))
    else:
        np.copyto(out, _numbers(raw, dtype, np.empty(raw.size // 2 if dtype == "BF16" else 0, np.uint32)))


def _dot(a: Array, b: Array) -> float:
    """Σ a·b, on the calling thread."""
    whole = a.size - a.size % _DOT_ITEMS
    parts = np.vecdot(a[:whole].reshape(-1, _DOT_ITEMS), b[:whole].reshape(-1, _DOT_ITEMS))
    return float(parts.sum(dtype=np.float64)) + float(np.vecdot(a[whole:], b[whole:]))


def _numbers(raw: Array, dtype: str, bits: Array) -> Array:
    """A view of `raw` as numbers that numpy knows; bfloat16, the upper half of a float32, takes shape in `bits`."""
    if dtype != "BF16":
        return raw.view(_NATIVE[dtype])
    half = raw.view(np.uint16)
    bits = bits[: half.size]
    np.copyto(bits, half)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)
