"""One-dimensional Gaussians with exact scores: what every objective's gradient is held to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastdistill.diffusion import EDM, VP, RectifiedFlow


@dataclasses.dataclass(frozen=True)
class Gaussians:
    """Teacher N(0, teacher_variance), student N(mean, scale^2), at one (alpha, sigma)."""

    mean: float = 0.8
    scale: float = 0.6
    teacher_variance: float = 1.0
    alpha: float = 1.0
    sigma: float = 0.5

    @property
    def variance_p(self) -> float:
        return self.alpha**2 * self.teacher_variance + self.sigma**2

    @property
    def variance_q(self) -> float:
        return self.alpha**2 * self.scale**2 + self.sigma**2

    def nodes(self, order: int) -> tuple[Tensor, Tensor, Tensor]:
        """Standard normal z, eps and their quadrature weights, each [order^2], float64."""
        points, weights = np.polynomial.hermite_e.hermegauss(order)
        points, weights = torch.from_numpy(points), torch.from_numpy(weights / weights.sum())
        z, eps = torch.meshgrid(points, points, indexing="ij")
        return z.flatten(), eps.flatten(), torch.outer(weights, weights).flatten()

    def log_ratio(self, x_t: Tensor) -> Tensor:
        """log p_t / q_t."""
        return (
            0.5 * math.log(self.variance_q / self.variance_p)
            + (x_t - self.alpha * self.mean) ** 2 / (2 * self.variance_q)
            - x_t**2 / (2 * self.variance_p)
        )

    def denoisers(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] under teacher and student."""
        teacher = self.alpha * self.teacher_variance / self.variance_p * x_t
        gain = self.alpha * self.scale**2 / self.variance_q
        return teacher, self.mean + gain * (x_t - self.alpha * self.mean)


def random_cases() -> Iterator[tuple[EDM | VP | RectifiedFlow, float, Gaussians]]:
    """Three random configurations with their process and time; teacher wider than the student."""
    generator = np.random.default_rng()
    for process, t in ((EDM(), 0.4), (VP.dit(), 250.0), (RectifiedFlow(), 0.4)):
        mean, scale, variance, shift = generator.uniform((0.2, 0.5, 0.9, 0.8), (0.9, 0.8, 1.5, 1.2))
        time = torch.tensor(t * shift, dtype=torch.float64)
        alpha, sigma = (float(value) for value in process.alpha_sigma(time))
        yield process, float(time), Gaussians(mean, scale, variance, alpha, sigma)


def random_configurations() -> Iterator[Gaussians]:
    """The configurations of `random_cases`."""
    return (gaussians for _, _, gaussians in random_cases())
