"""A loss curve as text: braille dots, two columns and four rows of them in each character."""

import math
from collections.abc import Sequence

Point = tuple[float, float]
# Bit of each dot of a braille character, by row (top first) and column.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
BLANK = 0x2800


def curve(points: Sequence[Point], *, width: int = 60, height: int = 8) -> list[str]:
    """`height` lines, axis included, that show y over x; points that share a column are averaged. Values that are
    not finite are left out; without any other there is no curve."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return []
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    labels = [f"{high:.3f}", *[""] * (height - 2), f"{low:.3f}"]
    margin = max(len(label) for label in labels)
    columns = _columns(finite, 2 * width)
    rows = _canvas(columns, low, high, width, height)
    return [f"{label:>{margin}} ┤{row}".rstrip() for label, row in zip(labels, rows, strict=True)]


def smooth(points: Sequence[Point], *, weight: float = 0.9) -> list[Point]:
    """The exponential moving average of y, each point with the same share of what came before it from the start."""
    mean = total = 0.0
    smoothed: list[Point] = []
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        smoothed.append((x, mean / total))
    return smoothed


def _columns(points: Sequence[Point], count: int) -> dict[int, float]:
    """Column → mean y, for the columns that have points."""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    scale = (count - 1) / (right - left) if right > left else 0.0
    sums: dict[int, list[float]] = {}
    for x, y in points:
        sums.setdefault(round((x - left) * scale), []).append(y)
    return {column: sum(ys) / len(ys) for column, ys in sorted(sums.items())}


def _canvas(columns: dict[int, float], low: float, high: float, width: int, height: int) -> list[str]:
    """The dots of all columns, each joined to the one before it."""
    cells = [[BLANK] * width for _ in range(height)]
    last = 4 * height - 1
    scale = last / (high - low) if high > low else 0.0
    before: tuple[int, int] | None = None
    for column, value in columns.items():
        row = last - round((value - low) * scale)
        for x, y in _line(before or (column, row), (column, row)):
            cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
        before = (column, row)
    return ["".join(map(chr, line)).rstrip(chr(BLANK)) for line in cells]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Dots from `start` to `end`, both included."""
    (x0, y0), (x1, y1) = start, end
    steps = max(abs(x1 - x0), abs(y1 - y0), 1)
    return [(x0 + round((x1 - x0) * i / steps), y0 + round((y1 - y0) * i / steps)) for i in range(steps + 1)]
