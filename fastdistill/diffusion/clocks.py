"""Clocks in which the probability-flow ODE of every process is one curve with a velocity.

A clock turns x = x_t / alpha at lambda = sigma / alpha into y = scale x, so that along the curve

    dy / dtime = V        D = skip y - out V        d time / d ln lambda = rate

and V = (skip y - X) / out is the curve's velocity for a denoiser's X = D(x_t, t), and that of the
straight path of one pair for its clean sample X = x_0.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

from torch import Tensor


class Moment(NamedTuple):
    """A clock's numbers at a noise level, each of the shape of lambda."""

    time: Tensor
    scale: Tensor
    skip: Tensor
    out: Tensor
    rate: Tensor


class Clock(Protocol):
    """A time for every noise level."""

    def at(self, ratio: Tensor) -> Moment:
        """The numbers at lambda = sigma / alpha."""


@dataclasses.dataclass(frozen=True)
class TrigFlow:
    """y = cos(tau) x_0 + sin(tau) sigma_data eps, tau = atan(lambda / sigma_data).

    Its time is tau in [0, pi / 2] (sCM, arXiv 2410.11081); V is sigma_data F.
    """

    sigma_data: float = 0.5

    def at(self, ratio: Tensor) -> Moment:
        norm = (ratio.square() + self.sigma_data**2).rsqrt()
        cos, sin = self.sigma_data * norm, ratio * norm
        return Moment((ratio / self.sigma_data).atan(), cos, cos, sin, cos * sin)


@dataclasses.dataclass(frozen=True)
class LinearFlow:
    """y = (1 - s) x_0 + s eps, s = lambda / (1 + lambda) in [0, 1]: rectified flow's own clock."""

    def at(self, ratio: Tensor) -> Moment:
        rest = 1 / (1 + ratio)
        s = ratio * rest
        return Moment(s, rest, ratio.new_ones(ratio.shape), s, s * rest)
