"""Laws of pairs of noise levels (t, r), r < t, between which a consistency loss compares.

Levels are ratios sigma / alpha, the "EDM sigma" that all processes share. Both laws move with
training: the gap closes, so that the bias of a coarse start becomes the variance of a fine end.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastdistill.diffusion.noise import Noise
from fastdistill.diffusion.process import Process

LOWEST_RATIO = 0.002
"""What stands for no noise where a process' clock begins at none: EDM's sigma_min."""


class Reach(NamedTuple):
    """The noise levels sigma / alpha that a process has."""

    low: float
    high: float


def reach_of(process: Process) -> Reach:
    """The least noise of a process' usual grid (0.002 where it is none), and the most."""
    ends = process.time_of_position(torch.tensor([0.0, 1.0], device="cpu"))
    alpha, sigma = process.alpha_sigma(ends)
    low, high = (sigma / alpha).tolist()
    return Reach(low or LOWEST_RATIO, high)


class PairLaw(Protocol):
    """A distribution of pairs of noise levels."""

    def lowest(self, reach: Reach) -> float:
        """The level at which the consistency function is the identity; 0 is the clean sample."""

    def progress(self, step: int, steps: int) -> float:
        """Where the law stands at a step, as the number that `sample` takes."""

    def sample(
        self, reach: Reach, noise: Noise, stream: str, index: Tensor, progress: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Levels (t, r) of the samples with these global indices, float32 [B] each.

        Args:
            reach: levels of the process; r is at least its lowest, or 0.
            noise: source of randomness.
            stream: name of the stream.
            index: global index of each sample, int64 [B].
            progress: what `progress` says, as a tensor that holds one number.
        """


@dataclasses.dataclass(frozen=True)
class ImprovedPairs:
    """Neighbours on a Karras grid that doubles (iCT, arXiv 2310.14189, sections 3.4 and 3.5).

    The grid has N(k) = min(first 2^floor(k / K'), last) + 1 levels at step k of K, with K' =
    floor(K / (log2 floor(last / first) + 1)). Pair i has the probability that ln sigma of
    N(mean, std^2), cut to the grid, lies between its two levels, which is iCT's p(i).
    """

    first: int = 10
    last: int = 1280
    mean: float = -1.1
    std: float = 2.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def lowest(self, reach: Reach) -> float:
        return max(self.sigma_min, reach.low)

    def progress(self, step: int, steps: int) -> float:
        """Number of pairs, N(k) - 1."""
        doubling = math.floor(steps / (math.log2(self.last // self.first) + 1))
        return min(self.first * 2 ** (step // max(doubling, 1)), self.last)

    def sample(
        self, reach: Reach, noise: Noise, stream: str, index: Tensor, progress: Tensor
    ) -> tuple[Tensor, Tensor]:
        low, high = self.lowest(reach), min(self.sigma_max, reach.high)
        first, last = low ** (1 / self.rho), high ** (1 / self.rho)
        ends = [
            math.erf((math.log(s) - self.mean) / (math.sqrt(2) * self.std)) for s in (low, high)
        ]
        share = ends[0] + noise.uniform(stream, index) * (ends[1] - ends[0])
        sigma = (self.mean + math.sqrt(2) * self.std * torch.erfinv(share)).exp()
        place = (sigma ** (1 / self.rho) - first) / (last - first) * progress
        i = torch.minimum(place.floor().clamp(min=0), progress - 1)
        levels = [(first + k / progress * (last - first)) ** self.rho for k in (i + 1, i)]
        above, below = (level.clamp(low, high) for level in levels)
        return above, below


@dataclasses.dataclass(frozen=True)
class EasyPairs:
    """Log-normal t, and r that draws near t in stages (ECT, arXiv 2406.14548, section 3).

    r = t max(0, 1 - (1 + k sigmoid(-b t)) / q^(stage + 1)); r below the process' least noise is 0,
    where the target is the clean sample, so that the first stage is mostly diffusion training.
    """

    mean: float = -1.1
    std: float = 2.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    stages: int = 8
    """Equal parts of the training."""

    def lowest(self, reach: Reach) -> float:
        return 0.0

    def progress(self, step: int, steps: int) -> float:
        """q^-(stage + 1)."""
        return self.q ** -(step * self.stages // steps + 1)

    def sample(
        self, reach: Reach, noise: Noise, stream: str, index: Tensor, progress: Tensor
    ) -> tuple[Tensor, Tensor]:
        t = (self.mean + self.std * noise.normal(stream, index)).exp().clamp(*reach)
        r = t * (1 - progress * (1 + self.k * torch.sigmoid(-self.b * t)))
        return t, torch.where(r < reach.low, 0, r)
