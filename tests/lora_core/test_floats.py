from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.floats import Scratch

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


@pytest.mark.parametrize("dtype", TYPES)
@given(value=finite | middles)
def test_narrowing_gives_the_nearest_number_ties_to_even(dtype, value):
    limit = float(
        np.array([{"BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7FFFFF}[dtype]], NEXT[dtype]).view(TYPES[dtype])[0]
    )
    if abs(value) > limit:
        value = limit * (value / abs(value))
    raw, _ = Scratch(1).narrow(np.array([value]), dtype)
    assert float(raw.view(TYPES[dtype])[0]) == nearest(value, dtype)


def test_rounding_twice_would_be_wrong_and_is_not_done():
    just_above_the_middle = np.array([1 + 2**-8 + 2**-30])
    assert just_above_the_middle.astype(np.float32).astype(ml_dtypes.bfloat16)[0] == 1
    assert Scratch(1).narrow(just_above_the_middle, "BF16")[0].view(ml_dtypes.bfloat16)[0] == 1 + 2**-7


@pytest.mark.parametrize("dtype", TYPES)
def test_widening_is_exact(dtype):
    raw = np.arange(2**16, dtype=np.uint16).view(np.uint8)  # every 16-bit number
    with np.errstate(invalid="ignore"):
        numbers = raw.view(TYPES[dtype]).astype(np.float64)
    scratch = Scratch(numbers.size)
    np.testing.assert_array_equal(scratch.widen(raw, dtype, scratch.values), numbers)


@pytest.mark.parametrize(("dtype", "value"), [("F16", 65520.0), ("BF16", 3.4e38), ("F32", 3.5e38), ("BF16", np.nan)])
def test_what_does_not_fit_shows_in_the_loss(dtype, value):
    values, scratch = np.array([1.0, value]), Scratch(2)
    assert not np.isfinite(scratch.narrow(values, dtype)[1].lost)
