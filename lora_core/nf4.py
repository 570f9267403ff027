"""NF4, the 4-bit numbers of QLoRA (arXiv:2305.14314), in numpy: the W0 that a QLoRA training saw.

As bitsandbytes does it: blocks of 64 numbers share one absolute maximum; these maxima, less their mean, are themselves
8-bit numbers in blocks of 256 (double quantisation). The block size divides a row, so that rows stand for themselves.
"""

import numpy as np

from lora_core.floats import Array

BLOCK = 64
BLOCK_OF_MAXIMA = 256
# Quantiles of the normal distribution, one of them 0, scaled to [-1, 1]: appendix E of the paper.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_SMALLEST = np.float32(1e-38)


def block_maxima(values: Array) -> Array:
    """float32 absolute maximum of each 64 numbers of `values` (rows, columns), flat; 64 divides the columns."""
    return np.abs(values.astype(np.float32).reshape(-1, BLOCK)).max(axis=1)


def maxima_codes(maxima: Array) -> tuple[Array, Array, Array]:
    """The maxima of a whole tensor in 8 bits: indices into `EIGHT_BITS`, the largest of each 256 (float32), and the
    mean (float32, one number) that was taken off."""
    offset = np.float32(maxima.mean(dtype=np.float64))
    centred = maxima - offset
    padded = np.zeros(-len(centred) % BLOCK_OF_MAXIMA, np.float32)
    blocks = np.concatenate([centred, padded]).reshape(-1, BLOCK_OF_MAXIMA)
    largest = np.abs(blocks).max(axis=1)
    return codes(blocks, largest, EIGHT_BITS).reshape(-1)[: len(maxima)], largest, np.asarray(offset)


def stored_maxima(maxima: Array) -> Array:
    """The maxima of a whole tensor as double quantisation gives them back."""
    indices, largest, offset = maxima_codes(maxima)
    return EIGHT_BITS[indices] * np.repeat(largest, BLOCK_OF_MAXIMA)[: len(maxima)] + offset


def round_trip(values: Array, maxima: Array, stored: Array) -> Array:
    """float32 of what is left of `values` (rows, columns) in 4 bits; maxima and stored ones are those of its blocks."""
    blocks = values.astype(np.float32).reshape(-1, BLOCK)
    return (LEVELS[codes(blocks, maxima, LEVELS)] * stored[:, None]).reshape(values.shape)


def to_dtype(values: Array, dtype: str) -> Array:
    """float32 numbers rounded to those of `dtype` ("F32", "BF16", …), as float32."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def codes(blocks: Array, maxima: Array, levels: Array) -> Array:
    """The index, a byte, of the nearest of `levels` to each number over its block's maximum; between two, the lower."""
    scaled = np.clip(blocks * (np.float32(1) / np.maximum(maxima, _SMALLEST))[:, None], -1, 1)
    return np.searchsorted((levels[:-1] + levels[1:]) / np.float32(2), scaled, side="left").astype(np.uint8)


def _eight_bits() -> Array:
    """The 256 levels of "dynamic" 8-bit numbers (arXiv:1511.04561): seven powers of ten, each cut finer than the one
    below, both signs, 0 and 1. The edges are those of torch.linspace: counted from both ends, each rounded once."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        low, high, cuts = np.float32(0.1), np.float32(1), 2**exponent
        step, count = np.float64((high - low) / np.float32(cuts)), np.arange(cuts + 1)
        edges = np.where(2 * count <= cuts, low + step * count, high - step * count[::-1]).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        levels += [*means, *-means]
    return np.sort(np.array(levels, np.float32))


EIGHT_BITS = _eight_bits()
