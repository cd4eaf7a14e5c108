"""Laws that training times are drawn from; each gives t in the clock of the process at hand."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from fastdistill.diffusion.noise import Noise
from fastdistill.diffusion.process import Process


class TimestepLaw(Protocol):
    """A distribution of times."""

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        """Times of the samples with these global indices, float32 [B]."""


@dataclasses.dataclass(frozen=True)
class LogNormalSigma:
    """ln(sigma / alpha) ~ N(mean, std^2), EDM's training law (P_mean, P_std)."""

    mean: float = -1.2
    std: float = 1.2

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        return process.time_of_ratio((self.mean + self.std * noise.normal(stream, index)).exp())


@dataclasses.dataclass(frozen=True)
class KarrasIndex:
    """sigma / alpha uniform over indices first ... last of a Karras grid of ``steps`` levels.

    Index 0 is ``sigma_min``. FastGen uses 2 ... 998 of 1000, DMD2 20 ... 980.
    """

    first: int = 2
    last: int = 998
    steps: int = 1000
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        u = noise.uniform(stream, index)
        level = self.first + (u * (self.last + 1 - self.first)).floor()
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return process.time_of_ratio((low + level / (self.steps - 1) * (high - low)) ** self.rho)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform between two positions of the process' usual grid (its index, or its shifted t)."""

    low: float = 0.0
    high: float = 1.0

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        u = noise.uniform(stream, index)
        return process.time_of_position(self.low + (self.high - self.low) * u)


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """logit(position) ~ N(mean, std^2), the law of SD3 and MeanFlow."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        logit = self.mean + self.std * noise.normal(stream, index)
        return process.time_of_position(torch.sigmoid(logit))


@dataclasses.dataclass(frozen=True)
class FixedList:
    """Uniform over a list of times, as a few-step student's."""

    times: tuple[float, ...]

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        # A tensor of the list would be a copy from the host in every step; scalars are not.
        position = noise.uniform(stream, index) * len(self.times)
        t = torch.full_like(position, self.times[0])
        for k, time in enumerate(self.times[1:], start=1):
            t = torch.where(position >= k, time, t)
        return t
