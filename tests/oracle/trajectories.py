"""Gaussians whose consistency function and average velocity are known, in every process.

Each is a network of the parametrisation x0, so that its raw output is D, and has a mean and a
variance as parameters, which need not be those of the data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fastdistill.diffusion import EDM, VP, X0, FixedList, Noise, Process, RectifiedFlow
from fastdistill.models import Denoiser
from fastdistill.objectives import Batch

SHAPE = (3,)


class _Gaussian(nn.Module):
    def __init__(self, process: Process, mean: float, variance: float) -> None:
        super().__init__()
        self.process = process
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.variance = nn.Parameter(torch.tensor(variance, dtype=torch.float64))
        self.graphs: list[bool] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        self.graphs.append(torch.is_grad_enabled())
        alpha, sigma = (number.reshape(-1, 1) for number in self.process.alpha_sigma(t))
        return self.denoised(x_t / alpha, sigma / alpha)

    def denoised(self, x: Tensor, ratio: Tensor) -> Tensor:
        raise NotImplementedError


class Posterior(_Gaussian):
    """E[x_0 | x_t], the teacher's kind."""

    def denoised(self, x: Tensor, ratio: Tensor) -> Tensor:
        return self.mean + self.variance / (self.variance + ratio**2) * (x - self.mean)


class ConsistencyFunction(_Gaussian):
    """The D behind f = mean + sqrt((variance + low^2) / (variance + ratio^2)) (x - mean)."""

    def __init__(self, *numbers, lowest: float = 0.0) -> None:
        super().__init__(*numbers)
        self.lowest = lowest

    def denoised(self, x: Tensor, ratio: Tensor) -> Tensor:
        gain = ((self.variance + self.lowest**2) / (self.variance + ratio**2)).sqrt()
        share = (self.lowest / ratio).clamp(max=1 - 1e-9)
        return (self.mean + gain * (x - self.mean) - share * x) / (1 - share)


class AverageVelocity(_Gaussian):
    """y - s u(y, r, s), with u the average velocity of rectified flow between s and r."""

    two_times = True

    def forward(self, x_t: Tensor, times: Tensor, condition: Tensor | None) -> Tensor:
        self.graphs.append(torch.is_grad_enabled())
        t, way = times.unbind(1)
        alpha, sigma = (number.reshape(-1, 1) for number in self.process.alpha_sigma(t))
        s = sigma / (alpha + sigma)
        r, y = s - way.reshape(-1, 1), x_t / (alpha + sigma)
        return y - s * self.velocity(y, r, s)

    def velocity(self, y: Tensor, r: Tensor, s: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        spread, spread_r = ((1 - time) ** 2 * variance + time**2 for time in (s, r))
        off = y - (1 - s) * mean
        apart = (s - r).abs() > 1e-9
        average = (y - (1 - r) * mean - (spread_r / spread).sqrt() * off) / torch.where(
            apart, s - r, 1
        )
        instant = (s - (1 - s) * variance) / spread * off - mean
        return torch.where(apart, average, instant)


class Times(FixedList):
    """Times in float64, spread between two noise levels; the draws of one stream are its own."""

    def sample(self, process, noise, stream, index):
        low, high = (math.log(time) for time in self.times)
        share = noise.uniform(stream, index).double()
        return process.time_of_ratio((low + share * (high - low)).exp())


@dataclasses.dataclass(frozen=True)
class Case:
    """Data N(mean, variance) in a process."""

    process: Process
    mean: float
    variance: float

    def denoiser(self, kind: type[_Gaussian], mean=None, variance=None, **options) -> Denoiser:
        """One that is right about the data, or has another mean or variance."""
        numbers = (self.mean if mean is None else mean, variance or self.variance)
        return Denoiser(kind(self.process, *numbers, **options), self.process, X0())

    def batch(self, count: int = 64, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
        real = self.mean + math.sqrt(self.variance) * z
        return Batch(torch.arange(count), Noise(seed), 1 / count, SHAPE, real)


def random_cases() -> Iterator[Case]:
    generator = np.random.default_rng()
    for process in (EDM(), VP.dit(), RectifiedFlow()):
        mean, variance = generator.uniform((-0.8, 0.3), (0.8, 1.5))
        yield Case(process, float(mean), float(variance))


def gradients(denoiser: Denoiser) -> list[float]:
    """Those of the mean and of the variance, which are then cleared."""
    found = [float(value.grad) for value in denoiser.parameters()]
    denoiser.zero_grad()
    return found
