"""Learning-rate schedules as functions of the update number, so that resuming needs no state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    update: int, updates: int, schedule: Schedule, warmup: int = 0, final: float = 0.0
) -> float:
    """Factor of the learning rate at an update.

    Args:
        update: number of updates done so far, from 0.
        updates: number of updates of the whole run.
        schedule: constant, or falling to ``final`` along a line or half a cosine.
        warmup: updates over which the factor first rises linearly to 1.
        final: factor at the end of the run.
    """
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((update - warmup) / max(updates - warmup, 1), 1.0)
    remaining = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final + (1 - final) * remaining
