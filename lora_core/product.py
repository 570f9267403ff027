"""values += left · right in float64: the arithmetic of a merge, in numpy's own OpenBLAS."""

import ctypes
import importlib
import os
from collections.abc import Callable

import numpy as np

from lora_core.floats import Array

# Products of at most so many multiplications stay on the calling thread in OpenBLAS. Its threads beside ours, on
# the same cores, wait for each other: a merge took 50 times as long.
# Where OpenBLAS is told to keep to one thread, whole blocks are quicker.
TILE_MULTIPLICATIONS = 2**60 if os.environ.get("OPENBLAS_NUM_THREADS") == "1" else 2**18
# Up to this r, OpenBLAS takes the sum of a number in one go; beyond, `values` would take part in it before its end.
_MAX_RANK = 128
_ROW_MAJOR, _NOT_TRANSPOSED = 101, 111

Gemm = Callable[..., None]


def add_product(values: Array, left: Array, right: Array, scratch: Array) -> None:
    """values += left · right, on the calling thread; `scratch` holds as many numbers as `values`. All are float64."""
    rows, r = left.shape
    columns = right.shape[1]
    step = min(max(TILE_MULTIPLICATIONS // max(rows * r, 1), 1), columns)
    gemm = _gemm if _is_plain(values, left, right) else None
    for begin in range(0, columns, step):
        width = min(step, columns - begin)
        if gemm and width > 1:  # see `_is_plain`
            _accumulate(gemm, values, left, right, slice(begin, begin + width))
        else:
            tile = scratch[: rows * width].reshape(rows, width)
            np.matmul(left, right[:, begin : begin + width], out=tile)
            values[:, begin : begin + width] += tile


def _is_plain(values: Array, left: Array, right: Array) -> bool:
    """Whether OpenBLAS can be handed the memory as it lies, and sums as numpy's product does: a single row or column
    numpy gives to another function."""
    matrices = (values, left, right)
    return min(values.shape) > 1 and 1 <= left.shape[1] <= _MAX_RANK and all(m.flags.c_contiguous for m in matrices)


def _accumulate(gemm: Gemm, values: Array, left: Array, right: Array, part: slice) -> None:
    """Those columns of the sum. numpy's product would fill another matrix with zeros, then with the product, and read
    it once more to add it: a third of what the arithmetic takes. The bits are the same."""
    (rows, r), columns = left.shape, right.shape[1]
    sizes = rows, part.stop - part.start, r
    a, b, c = left.ctypes.data, right.ctypes.data + 8 * part.start, values.ctypes.data + 8 * part.start
    gemm(_ROW_MAJOR, _NOT_TRANSPOSED, _NOT_TRANSPOSED, *sizes, 1.0, a, r, b, columns, 1.0, c, columns)


def _find_gemm() -> Gemm | None:
    """cblas_dgemm as wheels of numpy hold it, with 64-bit sizes; None where numpy was built otherwise."""
    try:
        library = ctypes.CDLL(str(importlib.import_module("numpy._core._multiarray_umath").__file__))
        gemm = library.scipy_cblas_dgemm64_
    except (ImportError, OSError, AttributeError):
        return None
    size, number, address = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    order = [ctypes.c_int] * 3
    gemm.argtypes = [*order, size, size, size, number, address, size, address, size, number, address, size]
    gemm.restype = None
    return gemm


_gemm = _find_gemm()
