"""What a network predicts, as two numbers a sample: D(x_t, t) = a x_t + b F.

Every parametrisation is the pair (a, b); the quantity that it predicts is F = (D - a x_t) / b, and
a squared error in its space is 1 / b^2 times the squared error of D.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from fastdistill.ops import Coefficients


class Parametrisation(Protocol):
    """Maps (alpha, sigma) of a process to the coefficients of a network; tensors are [B]."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        """(a, b) with D = a x_t + b F."""

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """c_in, the factor of x_t at the network's input; None where it is 1."""

    def noise_condition(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network is told of the noise level."""


@dataclasses.dataclass(frozen=True)
class _Plain:
    """A network that reads x_t as it is, and t times ``time_scale``."""

    time_scale: float = 1.0

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        return None

    def noise_condition(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return t * self.time_scale


class Epsilon(_Plain):
    """F = eps: D = (x_t - sigma F) / alpha."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        return Coefficients(1 / alpha, -sigma / alpha)


class V(_Plain):
    """F = alpha eps - sigma x_0: D = (alpha x_t - sigma F) / (alpha^2 + sigma^2)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        norm = alpha.square() + sigma.square()
        return Coefficients(alpha / norm, -sigma / norm)


class X0(_Plain):
    """F = x_0: D = F."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        return Coefficients(torch.zeros_like(alpha), torch.ones_like(alpha))


class Flow(_Plain):
    """F = eps - x_0, the velocity of rectified flow: D = (x_t - sigma F) / (alpha + sigma)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        norm = alpha + sigma
        return Coefficients(1 / norm, -sigma / norm)


@dataclasses.dataclass(frozen=True)
class EDMPreconditioning:
    """D = c_skip x + c_out F(c_in x, ln(lambda) / 4) at x = x_t / alpha, lambda = sigma / alpha.

    Karras et al. 2022, table 1, stated for any process: data of standard deviation ``sigma_data``
    give the network inputs and targets of unit variance.
    """

    sigma_data: float = 0.5

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> Coefficients:
        ratio = sigma / alpha
        total = ratio.square() + self.sigma_data**2
        return Coefficients(
            self.sigma_data**2 / (total * alpha), ratio * self.sigma_data * total.rsqrt()
        )

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        return ((sigma / alpha).square() + self.sigma_data**2).rsqrt() / alpha

    def noise_condition(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma / alpha).log() / 4


def convert(
    value: Tensor,
    source: Parametrisation,
    target: Parametrisation,
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
) -> Tensor:
    """Turn a prediction in one parametrisation into another; all but alpha, sigma are [B, ...].

    ``convert(x0, X0(), Epsilon(), x_t, alpha, sigma)`` is the noise that leads from x0 to x_t.
    """
    shape = (-1, *[1] * (x_t.ndim - 1))
    a, b = (number.reshape(shape) for number in source.coefficients(alpha, sigma))
    a_new, b_new = (number.reshape(shape) for number in target.coefficients(alpha, sigma))
    return ((a - a_new) * x_t + b * value) / b_new


def loss_weight(space: Parametrisation, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weight 1 / b^2 that makes a squared error of D the squared error in ``space``  # [B]

    For `Epsilon` (alpha / sigma)^2, for `EDMPreconditioning` EDM's (sigma^2 + s^2) / (sigma s)^2.
    """
    return space.coefficients(alpha, sigma).b.square().reciprocal()
