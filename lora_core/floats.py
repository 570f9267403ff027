"""Between raw checkpoint bytes and float64: widening is exact, narrowing rounds once, to nearest even."""

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


def widen(raw: Array, dtype: str) -> Array:
    """uint8 bytes of `dtype` numbers → fresh float64, exact."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return _numbers(raw, dtype, np.empty(raw.size // 2, np.uint32)).astype(np.float64)


def square_sum(values: Array) -> float:
    """Σ x², on the calling thread: np.dot would start threads of its own for it."""
    return float(np.einsum("i,i", values, values))


class Scratch:
    """Buffers for `size` numbers, used again and again: fresh memory would cost more than the arithmetic."""

    def __init__(self, size: int) -> None:
        self.values = np.empty(size, np.float64)
        self.product = np.empty(size, np.float64)
        self._near = np.empty(size, np.float32)
        self._bits = np.empty(size, np.uint32)
        self._flags = np.empty(size, np.bool_)

    def widen(self, raw: Array, dtype: str, out: Array) -> Array:
        """uint8 bytes of `dtype` numbers → the first of `out` (float64), exact."""
        numbers = _numbers(raw, dtype, self._bits)
        with np.errstate(invalid="ignore"):  # a signalling NaN
            np.copyto(out[: numbers.size], numbers)
        return out[: numbers.size]

    def narrow(self, values: Array, dtype: str) -> Array:
        """float64 → fresh uint8 bytes of `dtype` numbers, each the nearest one, ties to even.

        What does not fit becomes infinite; `rounding_loss` tells.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            if dtype == "BF16":
                return self._bfloat16(values).view(np.uint8)
            return values.astype(_NATIVE[dtype]).view(np.uint8)

    def rounding_loss(self, values: Array, raw: Array, dtype: str) -> float:
        """Σ (narrowed − exact)²; it is finite only if every number in `values` and in `raw` is."""
        with np.errstate(invalid="ignore"):
            lost = self.widen(raw, dtype, self.product)
            np.subtract(lost, values, out=lost)
            return square_sum(lost)

    def _bfloat16(self, values: Array) -> Array:
        """By way of float32, without the error of rounding twice.

        The second rounding can only go astray from a float32 that lies exactly between two bfloat16 numbers. Where
        the first rounding moved a value there, take the float32 next to it, on the side the value came from.
        """
        near, bits, flags = self._near[: values.size], self._bits[: values.size], self._flags[: values.size]
        np.copyto(near, values, casting="same_kind")
        pattern = near.view(np.uint32)
        np.bitwise_and(pattern, 0xFFFF, out=bits)
        np.equal(bits, 0x8000, out=flags)
        between = np.flatnonzero(flags)
        exact, moved = np.abs(values[between]), np.abs(near[between]).astype(np.float64)
        pattern[between] += (exact > moved).astype(np.uint32)
        pattern[between] -= (exact < moved).astype(np.uint32)
        np.right_shift(pattern, 16, out=bits)
        np.bitwise_and(bits, 1, out=bits)
        np.add(bits, 0x7FFF, out=bits)
        np.add(bits, pattern, out=bits)
        np.right_shift(bits, 16, out=bits)
        return bits.astype(np.uint16)


def _numbers(raw: Array, dtype: str, bits: Array) -> Array:
    """A view of `raw` as numbers that numpy knows; bfloat16, the upper half of a float32, takes shape in `bits`."""
    if dtype != "BF16":
        return raw.view(_NATIVE[dtype])
    half = raw.view(np.uint16)
    bits = bits[: half.size]
    np.copyto(bits, half)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)
