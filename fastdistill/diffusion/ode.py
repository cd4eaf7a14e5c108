"""`integrate`: Dormand and Prince's method of order five, for trajectories that serve as the truth.

The step is chosen on the host from the embedded error of order four (Dormand and Prince 1980), so
that it is for tests and evaluations, and not for a training step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NODES = (0.2, 0.3, 0.8, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (
    71 / 57600,
    0.0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)


def integrate(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    tolerance: float = 1e-6,
    most_steps: int = 10_000,
) -> Tensor:
    """Solve dx/ds = velocity(x, s) from s = 0 to s = 1 for a batch, with one step for all samples.

    Args:
        velocity: slope of x [B, ...] at s.
        x: where to start  # [B, ...]
        tolerance: error of a step, beside 1 + |x|, in the worst sample.
        most_steps: steps after which the solution is given up.

    Returns:
        x at s = 1  # [B, ...]

    Raises:
        ValueError: where ``most_steps`` do not suffice, or the slope is not finite.
    """
    s, step = 0.0, 0.01
    slopes = [velocity(x, s)]
    for _ in range(most_steps):
        step = min(step, 1.0 - s)
        for node, weights in zip(_NODES, _STAGES, strict=True):
            moved = x + step * _combine(weights, slopes)
            slopes.append(velocity(moved, s + node * step))
        error = float(_worst(step * _combine(_ERROR, slopes), x, tolerance))
        if not error < float("inf"):
            raise ValueError(f"the slope is not finite after s = {s:.3g}")
        if error <= 1.0:
            x, s, slopes = moved, s + step, slopes[-1:]  # the last stage is the next step's first
            if 1.0 - s < 1e-12:
                return x
        else:
            slopes = slopes[:1]
        step *= min(5.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
    raise ValueError(f"{most_steps} steps lead to s = {s:.3g} only; choose a larger tolerance")


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total = total + weight * slope
    return total


def _worst(error: Tensor, x: Tensor, tolerance: float) -> Tensor:
    """Largest root mean square of a sample's error in units of the tolerance."""
    relative = (error / (tolerance * (1 + x.abs()))).flatten(1)
    return relative.square().mean(1).sqrt().max()
