"""Learning-rate schedules, as a factor of the peak rate."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def lr_factor(step: int, *, total: int, warmup: int, schedule: Schedule) -> float:
    """The factor of 0-based `step` out of `total`: up linearly over `warmup` steps, then down as `schedule` says."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0
