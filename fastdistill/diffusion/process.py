"""Forward processes x_t = alpha_t x_0 + sigma_t eps, each with its own clock t.

A process answers three questions: what are alpha and sigma at t, what t has a given noise-to-signal
ratio lambda = sigma / alpha (the "EDM sigma" that all processes share), and what t lies
at a given position between 0 (clean) and 1 (noise) of its usual grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class AlphaSigma(NamedTuple):
    """Coefficients of the forward process, each of the shape of t."""

    alpha: Tensor
    sigma: Tensor


class Process(Protocol):
    """A forward process; every method maps tensors elementwise, on their device."""

    def alpha_sigma(self, t: Tensor) -> AlphaSigma:
        """Signal and noise coefficients at time t."""

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        """Time t at which sigma / alpha equals ``ratio``."""

    def time_of_position(self, position: Tensor) -> Tensor:
        """Time at ``position`` in [0, 1] of the usual grid, from the least noise to the most."""

    def start_scale(self, t: Tensor) -> Tensor:
        """Standard deviation of the pure noise that a student starts from at time t."""


@dataclasses.dataclass(frozen=True)
class EDM:
    """Karras et al. 2022 (arXiv 2206.00364): alpha = 1, sigma = t; positions on the rho grid."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def alpha_sigma(self, t: Tensor) -> AlphaSigma:
        return AlphaSigma(torch.ones_like(t), t)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio

    def time_of_position(self, position: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + position * (high - low)) ** self.rho

    def start_scale(self, t: Tensor) -> Tensor:
        return t


@dataclasses.dataclass(frozen=True)
class VP:
    """Discrete variance-preserving (DDPM) process; t is the index 0 ... steps - 1.

    Between indices log(sigma / alpha) is interpolated linearly, so that alpha^2 + sigma^2 = 1
    everywhere and the table's own values hold at whole t. The named constructors hold published
    models' constants.

    Args:
        beta_start: the first beta; not used by squaredcos_cap_v2.
        beta_end: the last beta; in squaredcos_cap_v2 the largest.
        spacing: betas linear, linear in their square root (scaled_linear), or those of the cosine
            schedule of Nichol & Dhariwal 2021 (arXiv 2102.09672, equation 17), all as in diffusers.
        steps: number of indices.
    """

    beta_start: float
    beta_end: float
    spacing: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    steps: int = 1000

    @classmethod
    def dit(cls) -> VP:
        """DiT and PixArt-alpha: linear betas from 1e-4 to 2e-2."""
        return cls(1e-4, 2e-2, "linear")

    @classmethod
    def stable_diffusion(cls) -> VP:
        """SD 1.5 and SDXL: betas linear in their square root, from 0.00085 to 0.012."""
        return cls(0.00085, 0.012, "scaled_linear")

    @classmethod
    def cosine(cls, steps: int = 1000) -> VP:
        """The cosine schedule with betas of at most 0.999."""
        return cls(0.0, 0.999, "squaredcos_cap_v2", steps)

    @functools.cached_property
    def _log_ratios(self) -> Tensor:
        """log(sigma / alpha) at every index, computed in float64  # [steps]"""
        log_alpha_bar = torch.log1p(-self._betas()).cumsum(0)
        return 0.5 * (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar)

    def _betas(self) -> Tensor:
        if self.spacing == "squaredcos_cap_v2":
            share = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            alpha_bar = ((share + 0.008) / 1.008 * (math.pi / 2)).cos().square()
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=self.beta_end)
        if self.spacing == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        ends = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        return torch.linspace(*ends, self.steps, dtype=torch.float64).square()

    @functools.cached_property
    def _tables(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    def _table(self, like: Tensor) -> Tensor:
        """The table on the device of ``like``, copied there once."""
        key = (like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self._log_ratios.to(like.device, like.dtype)
        return self._tables[key]

    def alpha_sigma(self, t: Tensor) -> AlphaSigma:
        t = t if t.is_floating_point() else t.float()
        table = self._table(t)
        low = t.floor().clamp(0, self.steps - 2)
        index = low.long()
        log_ratio = torch.lerp(table[index], table[index + 1], t - low)
        return AlphaSigma(torch.sigmoid(-2 * log_ratio).sqrt(), torch.sigmoid(2 * log_ratio).sqrt())

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        log_ratio, table = ratio.log(), self._table(ratio)
        index = torch.searchsorted(table, log_ratio.contiguous()).clamp(1, self.steps - 1)
        low, high = table[index - 1], table[index]
        t = (index - 1) + (log_ratio - low) / (high - low)
        return t.clamp(0, self.steps - 1)

    def time_of_position(self, position: Tensor) -> Tensor:
        return (position * self.steps).floor().clamp(0, self.steps - 1)

    def start_scale(self, t: Tensor) -> Tensor:
        """1 at every t: DMD2 starts SDXL from unit noise at t = 399."""
        return torch.ones_like(t)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """Rectified flow: alpha = 1 - t, sigma = t, with the grid warped by a resolution shift.

    t = shift * u / (1 + (shift - 1) * u) at position u, which multiplies sigma / alpha by ``shift``
    (SD3 uses 3.0). The process itself does not depend on the shift; networks see the warped t.
    """

    shift: float = 1.0

    @classmethod
    def for_tokens(
        cls,
        tokens: int,
        base_tokens: int = 256,
        max_tokens: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> RectifiedFlow:
        """FLUX's dynamic shift exp(mu), mu linear in the number of image tokens."""
        slope = (max_shift - base_shift) / (max_tokens - base_tokens)
        return cls(math.exp(base_shift + slope * (tokens - base_tokens)))

    def alpha_sigma(self, t: Tensor) -> AlphaSigma:
        return AlphaSigma(1 - t, t)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)

    def time_of_position(self, position: Tensor) -> Tensor:
        return self.shift * position / (1 + (self.shift - 1) * position)

    def start_scale(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t for data of unit variance."""
        return ((1 - t).square() + t.square()).sqrt()
