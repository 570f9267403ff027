from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.floats import Scratch, Sums, compare

TYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
NEXT = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
finite = st.floats(allow_nan=False, allow_infinity=False)
# Close to the middle of two bfloat16 numbers, where rounding twice goes wrong.
middles = st.builds(
    lambda top, exponent, tiny, sign: sign * (top + 0.5 + tiny) * 2.0**exponent,
    st.integers(0, 255),
    st.integers(-140, 100),
    st.sampled_from([0.0, 2.0**-20, -(2.0**-20), 2.0**-40, -(2.0**-40)]),
    st.sampled_from([1, -1]),
)


def nearest(value: float, dtype: str) -> float:
    """By exact arithmetic: the closer of the neighbours of a first guess, the even one of two equally close."""
    kind, bits = TYPES[dtype], NEXT[dtype]
    with np.errstate(over="ignore"):
        guess = np.array([abs(value)]).astype(np.float32).astype(kind).view(bits)[0]
    top = np.array([np.inf]).astype(kind).view(bits)[0]
    candidates = [bits(b) for b in range(max(int(guess) - 2, 0), min(int(guess) + 3, int(top)))]
    exact = {b: Fraction(float(np.array([b]).view(kind)[0])) for b in candidates}
    best = min(candidates, key=lambda b: (abs(exact[b] - Fraction(abs(value))), int(b) & 1))
    return float(np.copysign(float(exact[best]), value))


def narrowed(values: list[float], dtype: str) -> np.ndarray:
    out = np.empty(len(values), TYPES[dtype])
    assert Scratch(len(values)).narrow(np.array(values), dtype, out.view(np.uint8))
    return out


@pytest.mark.parametrize("dtype", TYPES)
@given(value=finite | middles)
def test_narrowing_gives_the_nearest_number_ties_to_even(dtype, value):
    limit = float(
        np.array([{"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}[dtype]], NEXT[dtype]).view(TYPES[dtype])[0]
    )
    if abs(value) > limit:
        value = limit * (value / abs(value))
    assert float(narrowed([value], dtype)[0]) == nearest(value, dtype)


def test_rounding_twice_would_be_wrong_and_is_not_done():
    just_above_the_middle = np.array([1 + 2**-8 + 2**-30])
    assert just_above_the_middle.astype(np.float32).astype(ml_dtypes.bfloat16)[0] == 1
    assert narrowed(just_above_the_middle, "BF16")[0] == 1 + 2**-7


@pytest.mark.parametrize("count", [1, 3, 64, 65, 1000])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1 + 2**-8 + 2**-30, 1 + 2**-7),  # which float32 takes for the middle of 1 and the next number, as the others
        (1 + 2**-8 - 2**-30, 1),
        (1 + 2**-8, 1),
        (1 + 3 * 2**-8, 1 + 2**-6),
    ],
)
def test_many_between_two_numbers_are_rounded_as_a_few_are(count, sign, value, rounded):
    values = np.full(2000, 1.5)
    between = np.arange(count) * 2
    values[between] = sign * value
    expected = np.where(np.isin(np.arange(2000), between), sign * rounded, 1.5)
    np.testing.assert_array_equal(narrowed(values, "BF16").astype(np.float64), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_widening_is_exact(dtype):
    raw = np.arange(2**16, dtype=np.uint16).view(np.uint8)  # every 16-bit number
    with np.errstate(invalid="ignore"):
        numbers = raw.view(TYPES[dtype]).astype(np.float64)
    scratch = Scratch(numbers.size)
    scratch.widen(raw, dtype, scratch.values[: numbers.size])
    np.testing.assert_array_equal(scratch.values[: numbers.size], numbers)


TOO_LARGE = [("F16", 65520.0), ("BF16", 3.4e38), ("F32", 3.5e38), ("BF16", np.inf), ("BF16", np.nan), ("F32", np.nan)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "value"), TOO_LARGE)
def test_what_does_not_fit_is_told(dtype, value, sign):
    out = np.empty(2, TYPES[dtype])
    assert not Scratch(2).narrow(np.array([1.0, sign * value]), dtype, out.view(np.uint8))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "bits"), [("F16", 0x7BFF), ("BF16", 0x7F7F), ("F32", 0x7F7FFFFF)])
def test_the_largest_number_fits_and_so_does_what_rounds_to_it(dtype, bits, sign):
    largest = float(np.array([bits], NEXT[dtype]).view(TYPES[dtype])[0])
    values = [sign * largest, sign * largest * (1 + 2**-30)]
    assert [float(value) for value in narrowed(values, dtype)] == [sign * largest] * 2


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_no_nan_becomes_a_number(dtype):
    raw, scratch, out = np.full(8, 0xFF, np.uint8), Scratch(4), np.empty(8, np.uint8)
    raw[3::4] = raw[1::2] = 0x7F
    for bits in (raw, np.full(8, 0xFF, np.uint8)):
        values = scratch.values[: 8 // np.dtype(TYPES[dtype]).itemsize]
        scratch.widen(bits, dtype, values)
        assert not scratch.narrow(values, "BF16", out[: 2 * values.size])


def test_a_difference_is_told_in_sums_that_add_up():
    before, exact, after = (np.array(numbers) for numbers in ([3.0, 4.0], [3.5, 4.25], [3.0, 4.5]))
    sums = compare(before, exact, after)
    assert sums == Sums(weight=25, delta=0.3125, lost=0.3125, cross=-0.1875, changed=1, items=2)
    sums.add(sums)
    assert sums == Sums(weight=50, delta=0.625, lost=0.625, cross=-0.375, changed=2, items=4)
