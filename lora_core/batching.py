"""Which rows make which step: a pure function of lengths, seed and epoch."""

import random
from collections.abc import Sequence

# Rows are sorted by length within this many steps' worth: little padding, and still a random order.
_STEPS_PER_BUCKET = 16


def epoch_steps(lengths: Sequence[int], *, seed: int, epoch: int, batch_size: int) -> list[list[int]]:
    """Every row index once, in steps of `batch_size` rows of similar length, in random order."""
    chance = random.Random(f"{seed}:{epoch}")  # noqa: S311  not for secrets; the stream is stable across versions
    order = list(range(len(lengths)))
    chance.shuffle(order)
    bucket = batch_size * _STEPS_PER_BUCKET
    steps = []
    for start in range(0, len(order), bucket):
        rows = sorted(order[start : start + bucket], key=lambda row: lengths[row])
        steps += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    chance.shuffle(steps)
    return steps


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], *, max_tokens: int, packed: bool = False
) -> list[list[int]]:
    """The rows of a step, longest first, cut so that each piece has at most `max_tokens` tokens, padding included.

    `packed` pieces have no padding. A row that is longer than the limit stands alone.
    """
    pieces: list[list[int]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: -lengths[row]):
        tokens += lengths[row] if packed or not pieces else lengths[pieces[-1][0]]
        if pieces and tokens <= max_tokens:
            pieces[-1].append(row)
        else:
            pieces.append([row])
            tokens = lengths[row]
    return pieces
