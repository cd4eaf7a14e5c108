"""Laws that training times are drawn from; each gives t in the clock of the process at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastdistill.diffusion.noise import Noise
from fastdistill.diffusion.process import Process


class TimestepLaw(Protocol):
    """A distribution of times."""

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        """Times of the samples with these global indices, float32 [B]."""

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        """Times below whose noise levels the law lies with probability ``u``, of its shape."""


@dataclasses.dataclass(frozen=True)
class LogNormalSigma:
    """ln(sigma / alpha) ~ N(mean, std^2), EDM's training law (P_mean, P_std)."""

    mean: float = -1.2
    std: float = 1.2

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        return process.time_of_ratio((self.mean + self.std * noise.normal(stream, index)).exp())

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        return process.time_of_ratio((self.mean + self.std * torch.special.ndtri(u)).exp())


@dataclasses.dataclass(frozen=True)
class LogUniformSigma:
    """ln(sigma / alpha) uniform between two levels."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        return self.quantile(process, noise.uniform(stream, index))

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return process.time_of_ratio((low + u * (high - low)).exp())


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
        return self.quantile(process, noise.uniform(stream, index))

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        level = self.first + (u * (self.last + 1 - self.first)).floor()
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return process.time_of_ratio((low + level / (self.steps - 1) * (high - low)) ** self.rho)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform between two positions of the process' usual grid (its index, or its shifted t)."""

    low: float = 0.0
    high: float = 1.0

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        return self.quantile(process, noise.uniform(stream, index))

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        return process.time_of_position(self.low + (self.high - self.low) * u)


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """logit(position) ~ N(mean, std^2), the law of SD3 and MeanFlow."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        logit = self.mean + self.std * noise.normal(stream, index)
        return process.time_of_position(torch.sigmoid(logit))

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        logit = self.mean + self.std * torch.special.ndtri(u)
        return process.time_of_position(torch.sigmoid(logit))


@dataclasses.dataclass(frozen=True)
class FixedList:
    """Uniform over a list of times, as a few-step student's."""

    times: tuple[float, ...]

    def sample(self, process: Process, noise: Noise, stream: str, index: Tensor) -> Tensor:
        return _choose(self.times, noise.uniform(stream, index))

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        return _choose(sorted(self.times), u)  # every process' clock rises with the noise


def _choose(times: Sequence[float], u: Tensor) -> Tensor:
    """The time whose share of [0, 1] holds u, all having the same."""
    # A tensor of the list would be a copy from the host in every step; scalars are not.
    position = u * len(times)
    t = torch.full_like(position, times[0])
    for k, time in enumerate(times[1:], start=1):
        t = torch.where(position >= k, time, t)
    return t
