"""Gaussian mixtures as endless data sets, of which the density is known.

`ring` is the picture that mode dropping is usually shown on, `correlated` a harder one of any
dimension. Both have about unit variance in every coordinate.
"""

from __future__ import annotations

import math

import torch

from fastdistill.data.base import RealBatch
from fastdistill.diffusion import Drawn, GaussianMixture, Noise

_PRESET_SEED = 20260101
_LOG_SPECTRUM = (-1.0, 0.0)


class MixtureData:
    """Samples of a mixture, each drawn by (seed, step, its place in the batch): none comes twice.

    Args:
        mixture: what is drawn from.
        device: where the samples are made, and returned.
    """

    classes = 0
    """No labels: the mixture is unconditional."""

    def __init__(self, mixture: GaussianMixture, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.mixture = mixture.to(self.device)
        self._noise: dict[int, Noise] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.mixture.dimensions,)

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        index = torch.arange(count, device=self.device)[share]
        return RealBatch(self.draw(seed, step, index, "data").samples)

    def draw(self, seed: int, step: int, index: torch.Tensor, stream: str) -> Drawn:
        """Samples of a named stream, which share nothing with those of another."""
        if seed not in self._noise:
            self._noise[seed] = Noise(seed, self.device)
        return self.mixture.sample(self._noise[seed].at(step), index, f"mixture-{stream}")


def ring(components: int = 8, deviation: float = 0.2) -> GaussianMixture:
    """Equal round components on a circle of radius sqrt(2) in the plane.

    Args:
        components: their number.
        deviation: standard deviation of each; the centres of 8 are 1.08 apart, 5 of these.

    Raises:
        ValueError: for a deviation that is not positive.
    """
    if not deviation > 0:
        raise ValueError(f"deviation is {deviation}; expected more than 0")
    angle = 2 * math.pi * torch.arange(components, dtype=torch.float64) / components
    means = math.sqrt(2) * torch.stack((angle.cos(), angle.sin()), dim=1)
    return GaussianMixture(means, torch.full_like(means, deviation**2))


def correlated(components: int = 10, dimensions: int = 64) -> GaussianMixture:
    """Components with random means and weights, and with random axes of their own.

    Along its axes every component has variances from 0.1 to 1, equally spaced in the logarithm;
    the weights are between half and three halves of the mean. Everything is drawn from a fixed
    counter-based seed, so that it is the same on every machine.

    Args:
        components: their number; one makes a Gaussian.
        dimensions: numbers of one sample.
    """
    noise = Noise(_PRESET_SEED, "cpu")
    index = torch.arange(components)
    spectrum = torch.logspace(*_LOG_SPECTRUM, dimensions, dtype=torch.float64)
    between = math.sqrt(1.0 - float(spectrum.mean()))
    means = between * noise.normal("means", index, (dimensions,), torch.float64)
    square = (dimensions, dimensions)
    axes = torch.linalg.qr(noise.normal("axes", index, square, torch.float64)).Q
    covariances = axes * spectrum @ axes.mT
    return GaussianMixture(
        means, (covariances + covariances.mT) / 2, 0.5 + noise.uniform("weights", index)
    )
