import math

import pytest

from cli.curve import BLANK, curve, smooth


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """(column, row) of every dot."""
    found = set()
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    for y, line in enumerate(lines):
        for x, char in enumerate(line.partition("┤")[2]):
            cell = ord(char) - BLANK
            found |= {(2 * x + i, 4 * y + j) for j in range(4) for i in range(2) if cell & bits[j][i]}
    return found


def test_a_falling_loss_falls_from_the_upper_left_to_the_lower_right() -> None:
    seen = dots(curve([(step, 100 - step) for step in range(101)], width=20, height=5))
    assert (0, 0) in seen and (39, 19) in seen
    assert (39, 0) not in seen and (0, 19) not in seen


def test_every_column_between_two_points_is_joined() -> None:
    assert {x for x, _ in dots(curve([(0, 1.0), (10, 2.0)], width=10, height=4))} == set(range(20))


def test_the_axis_names_the_extremes() -> None:
    lines = curve([(0, 5.25), (1, 3.5), (2, 4.0)], width=8, height=4)
    assert len(lines) == 4
    assert lines[0].startswith("5.250 ┤") and lines[-1].startswith("3.500 ┤")


def test_points_in_one_column_are_averaged() -> None:
    points = [(x, 0.0 if x % 2 else 10.0) for x in range(1000)] + [(1000.0, 10.0)]
    middle = [y for x, y in dots(curve(points, width=5, height=5)) if x == 4]
    assert middle in ([9], [10])  # the mean of the extremes, and not a bar from one to the other


def test_a_single_point_and_a_flat_line_have_a_curve() -> None:
    assert len(dots(curve([(3, 1.5)], width=5, height=3))) == 1
    assert {y for _, y in dots(curve([(0, 1.5), (9, 1.5)], width=5, height=3))} == {11}


@pytest.mark.parametrize("points", [[], [(0, math.nan)], [(0, math.inf), (1, -math.inf)]])
def test_nothing_finite_is_no_curve(points: list[tuple[float, float]]) -> None:
    assert curve(points) == []


def test_values_that_are_not_finite_are_left_out() -> None:
    assert curve([(0, 1.0), (1, math.nan), (2, 2.0)]) == curve([(0, 1.0), (2, 2.0)])


def test_smoothing_keeps_a_flat_line_and_calms_a_jumpy_one() -> None:
    assert [y for _, y in smooth([(x, 2.0) for x in range(5)])] == pytest.approx([2.0] * 5)
    calm = smooth([(x, 10.0 * (x % 2)) for x in range(200)])
    assert [x for x, _ in calm] == list(range(200))
    assert all(4 < y < 6 for _, y in calm[100:])
    assert smooth([(0, 3.0), (1, 5.0)])[0] == pytest.approx((0, 3.0))
