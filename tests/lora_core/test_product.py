import numpy as np
import pytest

from lora_core import product
from lora_core.product import add_product

SHAPES = [(7, 3, 5), (64, 16, 96), (1, 4, 50), (40, 1, 1), (33, 128, 70), (20, 300, 40), (5, 0, 6)]


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


def add(values: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    changed = values.copy()
    add_product(changed, left, right, np.full(values.size, np.nan))
    return changed


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_has_the_bits_of_numpys_product_and_sum(shape, monkeypatch):
    monkeypatch.setattr(product, "TILE_MULTIPLICATIONS", 2**60)
    rows, r, columns = shape
    values, left, right = numbers(rows, columns), numbers(rows, r), numbers(r, columns)
    np.testing.assert_array_equal(add(values, left, right), values + left @ right)


def test_a_last_tile_of_one_column_has_the_bits_of_numpys_product_and_sum(monkeypatch):
    monkeypatch.setattr(product, "TILE_MULTIPLICATIONS", 44 * 64 * 93)
    values, left, right = numbers(44, 187), numbers(44, 64), numbers(64, 187)
    ours = add(values, left, right)
    monkeypatch.setattr(product, "_gemm", None)
    np.testing.assert_array_equal(ours, add(values, left, right))


@pytest.mark.parametrize("tile", [1, 1000, 2**60])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_right_in_tiles_and_without_openblas(shape, tile, monkeypatch):
    monkeypatch.setattr(product, "TILE_MULTIPLICATIONS", tile)
    rows, r, columns = shape
    values, left, right = numbers(rows, columns), numbers(rows, r), numbers(r, columns)
    ours = add(values, left, right)
    monkeypatch.setattr(product, "_gemm", None)
    for found in (ours, add(values, left, right)):
        np.testing.assert_allclose(found, values + left @ right, rtol=0, atol=1e-12)


def test_factors_that_do_not_lie_in_order_are_multiplied_too():
    values, left, right = numbers(30, 20), numbers(8, 30).T, numbers(20, 8).T
    np.testing.assert_allclose(add(values, left, right), values + left @ right, rtol=0, atol=1e-12)


def test_rows_beside_those_given_stay_as_they_are():
    values = numbers(9, 12)
    before = values.copy()
    left, right = numbers(5, 4), numbers(4, 12)
    add_product(values[2:7], left, right, np.empty(60))
    np.testing.assert_array_equal(values[[0, 1, 7, 8]], before[[0, 1, 7, 8]])
    np.testing.assert_allclose(values[2:7], before[2:7] + left @ right, rtol=0, atol=1e-12)
