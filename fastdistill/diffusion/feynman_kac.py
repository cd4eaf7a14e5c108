"""Feynman-Kac corrected sampling: guided, annealed, product and reward-tilted targets, exactly.

Guidance mixes scores, but the mixture of two diffused densities' scores is not the score of any
diffused density: the samples of a guided sampler follow no formula. Here particles carry weights
that make them samples of

    p_lambda(x) = prod_i q_i,lambda(x)^beta_i exp(b_lambda r(x)) / Z_lambda

at every noise level, and are resampled where the weights become uneven (sequential Monte Carlo;
arXiv 2503.02819). In EDM's variables x = x_t / alpha, lambda = sigma / alpha, every process is
dx = dW by the clock lambda^2, forward, so that one pair of formulas serves all. Backward, with
s_i = (D_i - x) / lambda^2, Q = sum_i beta_i s_i, g = b grad r, dv = -d(lambda^2) and any zeta,

    dx    = [1/2 Q + 1/2 zeta^2 (Q + g)] dv + zeta dW_v
    dlogw = 1/2 [<Q, Q + g> - sum_i beta_i |s_i|^2] dv + r db

The first half of the drift is the probability flow of the factors; the rest is Langevin dynamics of
the target, which leaves it as it is: hence weights without zeta. With B = sum_i beta_i,

    |Q|^2 - sum_i beta_i |s_i|^2 = (B - 1) sum_i beta_i |s_i|^2
                                   - sum_{i<j} beta_i beta_j |D_i - D_j|^2 / lambda^4

in which guidance (B = 1) keeps the difference alone: no precision is lost where the two agree.

The drift is that of a Gaussian of standard deviation sigma_data whose centre moves: with s for it,
D = sum_i beta_i D_i / B and nu^2 = lambda^2 + s^2, y = (1 + s^2 / lambda^2) (D - x) + x,

    Q = B (y - x) / nu^2,   d(nu^2) = d(lambda^2)

which is linear where y is held. A step solves it exactly, evaluates y at its end and solves it
again with y linear in ln nu (Heun's idea; weak order 2); Gaussian noise has the right variance at
any step size. log w is integrated by the trapezoid over ln lambda.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.diffusion.noise import Noise
from fastdistill.diffusion.process import Process
from fastdistill.diffusion.samplers import Denoise, in_edm_variables


@dataclasses.dataclass(frozen=True)
class Target:
    """The density prod_i q_i^beta_i exp(r), where q_i is what denoiser i was trained on.

    ======================  ==============================  ========================
    target                  denoisers                       exponents
    ======================  ==============================  ========================
    guided                  (unconditional, conditional)    (1 - scale, scale)
    annealed                (denoise,)                      (beta,)
    product                 (first, second)                 (1.0, 1.0)
    ======================  ==============================  ========================

    Args:
        denoisers: functions ``denoise(x_t, t) -> D`` of one process.
        exponents: beta of each. Their sum is positive: noise has to have a density.
        reward: r, a differentiable function of samples [B, ...] to [B]; absent for 0. At a noise
            level it counts b = 1 / (1 + lambda^2) and reads x_t / alpha.

    Raises:
        ValueError: for exponents that are not one a denoiser, or whose sum is not positive.
    """

    denoisers: tuple[Denoise, ...]
    exponents: tuple[float, ...]
    reward: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.denoisers) != len(self.exponents) or not self.denoisers:
            raise ValueError(
                f"{len(self.denoisers)} denoisers and {len(self.exponents)} exponents are given; "
                "expected one exponent for each denoiser, and at least one"
            )
        if not self.total > 0:
            raise ValueError(
                f"exponents {self.exponents} sum to {self.total}; expected a positive sum, since "
                "the target cannot be normalised at high noise otherwise"
            )

    @property
    def total(self) -> float:
        """B, the sum of the exponents."""
        return sum(self.exponents)


class Particles(NamedTuple):
    """Weighted samples of P populations of M particles."""

    samples: Tensor
    """[P * M, ...], a population in a row"""
    log_weights: Tensor
    """Normalised: the weights of a population sum to 1  # [P, M]"""
    effective_sample_size: Tensor
    """1 / sum w^2, as a share of M, at each level before resampling there  # [levels, P]"""

    def equally_weighted(self, seed: int = 0) -> Tensor:
        """The samples resampled once more, so that all count alike  # [P * M, ...]"""
        rows = torch.arange(self.log_weights.shape[0], device=self.samples.device)
        uniform = Noise(seed, self.samples.device).uniform("feynman-kac-last", rows)
        return self.samples[_rows(systematic_resampling(self.log_weights, uniform))]


class _Point(NamedTuple):
    """What the target says of particles at one level."""

    denoised: Tensor
    """sum_i beta_i D_i / B  # [B, ...]"""
    centre: Tensor
    """Mean of the Gaussian of standard deviation sigma_data that has this score  # [B, ...]"""
    rate: Tensor
    """dlogw / d ln(1 / lambda), without the reward's own change  # [B]"""
    slope: Tensor | None = None
    """b grad r  # [B, ...]"""
    reward: Tensor | None = None
    """r  # [B]"""

    def of(self, rows: Tensor) -> _Point:
        """That of chosen particles."""
        slope = None if self.slope is None else self.slope[rows]
        reward = None if self.reward is None else self.reward[rows]
        return _Point(self.denoised[rows], self.centre[rows], self.rate[rows], slope, reward)


class _Step(NamedTuple):
    """Numbers of a step."""

    keep: float
    """Factor of x - centre"""
    bend: float
    """Factor of the centre's change"""
    climb: float
    """Factor of the reward's slope"""
    spread: float
    """Standard deviation of the noise"""


@torch.no_grad()
def feynman_kac(
    target: Target,
    process: Process,
    sigmas: Sequence[float],
    index: Tensor,
    shape: Sequence[int],
    *,
    population: int | None = None,
    threshold: float = 0.5,
    stochasticity: float = 2.0,
    sigma_data: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Particles:
    """Sequential Monte Carlo samples of a target, two evaluations of each denoiser a step.

    The host waits for nothing: whether to resample is decided on the device. What is done to a
    population depends on the indices of its own particles alone.

    Args:
        target: what is sampled.
        process: the process of its denoisers.
        sigmas: levels of sigma / alpha from the highest to 0, as `karras_sigmas` gives them. The
            error falls with the square of the step: docs/feynman-kac.md has numbers.
        index: global index of each particle, int64 [P * M].
        shape: shape of one sample.
        population: M, the number of particles that compete; all of them if absent. Rows of one
            population share a condition, where denoisers have one.
        threshold: resample a population whose effective sample size is below this share of M; 0
            never does, 1 always.
        stochasticity: zeta^2, the noise injected as a share of the process'. 1 is the paper's
            SDE; more moves particles apart sooner after they were resampled; 0 is deterministic
            and leaves resampled particles equal.
        sigma_data: standard deviation of the data, roughly: what step sizes are fitted to.
        seed: of all random numbers.
        dtype: of the samples.

    Returns:
        `Particles`. Weights are those of the last level above 0, from which the samples are
        denoised.

    Raises:
        ValueError: for levels that do not fall to 0, particles that are not whole populations, and
            numbers out of range.
    """
    population = population or len(index)
    _check(sigmas, len(index), population, threshold, stochasticity, sigma_data)
    noise, first = Noise(seed, index.device), index.view(-1, population)[:, 0]
    evaluate = functools.partial(
        _evaluate,
        target,
        [in_edm_variables(denoise, process) for denoise in target.denoisers],
        sigma_data,
    )

    x = noise.normal("feynman-kac-start", index, shape, dtype) * (sigmas[0] / target.total**0.5)
    point = evaluate(x, sigmas[0])
    log_weights = torch.zeros_like(point.rate)
    if point.reward is not None:
        log_weights = _tilt(sigmas[0]) * point.reward
    log_weights = log_weights.view(-1, population).log_softmax(1)
    sizes = [_effective_size(log_weights)]
    for level, (sigma, next_sigma) in enumerate(pairwise(sigmas[:-1])):
        noise.at(level)
        chosen = systematic_resampling(log_weights, noise.uniform("feynman-kac-resample", first))
        keep = sizes[-1][:, None] >= threshold
        ancestors = torch.where(keep, torch.arange(population, device=x.device), chosen)
        log_weights = torch.where(keep, log_weights, -math.log(population))
        x, before = x[_rows(ancestors)], point.of(_rows(ancestors))

        levels = math.hypot(sigma, sigma_data), math.hypot(next_sigma, sigma_data)
        step = _step(*levels, target.total, stochasticity)
        x = _predicted(step, x, before, noise.normal("feynman-kac", index, shape, dtype))
        x = _corrected(step, x, before, evaluate(x, next_sigma))
        point = evaluate(x, next_sigma)
        gained = _gained(before, point, sigma, next_sigma).view(-1, population)
        log_weights = (log_weights + gained).log_softmax(1)
        sizes.append(_effective_size(log_weights))
    return Particles(point.denoised, log_weights, torch.stack(sizes))


def systematic_resampling(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Ancestors of equally weighted particles: floor(M w) or ceil(M w) children for each weight w.

    Args:
        log_weights: [P, M], normalised or not.
        uniform: one number in (0, 1) for each population [P].

    Returns:
        Positions within each population, ascending, int64 [P, M].
    """
    count = log_weights.shape[1]
    reached = log_weights.double().softmax(1).cumsum(1)
    position = torch.arange(count, device=log_weights.device) + uniform[:, None].double()
    chosen = torch.searchsorted(reached / reached[:, -1:], position / count)
    return chosen.clamp(max=count - 1)


def gaussian_target(
    means: Tensor, covariances: Tensor, exponents: Sequence[float], sigma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of prod_i N(m_i, C_i + sigma^2 I)^beta_i, where that is a density.

    Args:
        means: [K, d].
        covariances: [K, d, d].
        exponents: beta of each, K of them.
        sigma: noise level.

    Returns:
        Mean [d] and covariance [d, d], float64.

    Raises:
        ValueError: where the product cannot be normalised: sum_i beta_i (C_i + sigma^2 I)^-1 has to
            be positive definite.
    """
    eye = torch.eye(means.shape[1], dtype=torch.float64, device=means.device)
    beta = torch.tensor(list(exponents), dtype=torch.float64, device=means.device)
    precisions = beta[:, None, None] * torch.linalg.inv(covariances.double() + sigma**2 * eye)
    precision = precisions.sum(0)
    smallest = float(torch.linalg.eigvalsh(precision)[0])
    if not smallest > 0:
        raise ValueError(
            f"the target with exponents {tuple(exponents)} cannot be normalised at sigma {sigma}: "
            f"its precision has the eigenvalue {smallest:.3g}; take a guidance scale nearer to 1"
        )
    pulled = (precisions @ means.double()[:, :, None]).sum(0)[:, 0]
    return torch.linalg.solve(precision, pulled), torch.linalg.inv(precision)


def _evaluate(
    target: Target,
    denoisers: Sequence[Callable[[Tensor, float], Tensor]],
    sigma_data: float,
    x: Tensor,
    sigma: float,
) -> _Point:
    total = target.total
    parts = [(beta, d(x, sigma)) for beta, d in zip(target.exponents, denoisers, strict=True)]
    denoised = torch.stack([beta / total * d for beta, d in parts]).sum(0)
    centre = x + (1 + (sigma_data / sigma) ** 2) * (denoised - x)
    terms = [-beta * other * _dot(d - e, d - e) for (beta, d), (other, e) in combinations(parts, 2)]
    if total != 1:
        terms += [(total - 1) * beta * _dot(d - x, d - x) for beta, d in parts]
    rate = torch.stack(terms or [torch.zeros_like(_dot(x, x))]).sum(0) / sigma**2
    if target.reward is None:
        return _Point(denoised, centre, rate)
    reward, slope = _reward(target.reward, x)
    slope = _tilt(sigma) * slope
    return _Point(denoised, centre, rate + total * _dot(denoised - x, slope), slope, reward)


def _step(sigma: float, next_sigma: float, total: float, stochasticity: float) -> _Step:
    """The exact solution between two levels of nu."""
    decay = (1 + stochasticity) * total
    covered = decay * math.log(sigma / next_sigma)
    return _Step(
        keep=math.exp(-covered),
        bend=1 + math.expm1(-covered) / covered,
        climb=0.5 * stochasticity * _decayed(sigma, next_sigma, decay),
        spread=math.sqrt(stochasticity * _decayed(sigma, next_sigma, 2 * decay)),
    )


def _predicted(step: _Step, x: Tensor, before: _Point, z: Tensor) -> Tensor:
    x = before.centre + step.keep * (x - before.centre) + step.spread * z
    return x if before.slope is None else x + step.climb * before.slope


def _corrected(step: _Step, x: Tensor, before: _Point, after: _Point) -> Tensor:
    x = x + step.bend * (after.centre - before.centre)
    if before.slope is None or after.slope is None:
        return x
    return x + 0.5 * step.climb * (after.slope - before.slope)


def _effective_size(log_weights: Tensor) -> Tensor:
    """1 / sum w^2 of normalised weights, as a share of their number  # [P]"""
    return (2 * log_weights).exp().sum(1).reciprocal() / log_weights.shape[1]


def _decayed(sigma: float, next_sigma: float, power: float) -> float:
    """The integral of (next_sigma / s)^power d(s^2) from next_sigma to sigma."""
    length = math.log(sigma / next_sigma)
    growth = 2 - power
    return 2 * next_sigma**2 * (math.expm1(growth * length) / growth if growth else length)


def _gained(before: _Point, after: _Point, sigma: float, next_sigma: float) -> Tensor:
    """The log-weights that a step adds  # [B]"""
    gained = 0.5 * math.log(sigma / next_sigma) * (before.rate + after.rate)
    if before.reward is None or after.reward is None:
        return gained
    return gained + 0.5 * (_tilt(next_sigma) - _tilt(sigma)) * (before.reward + after.reward)


def _tilt(sigma: float) -> float:
    """b, how much the reward counts at a level."""
    return 1 / (1 + sigma**2)


@torch.enable_grad()
def _reward(reward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The reward of particles [B] and its gradient [B, ...]."""
    x = x.detach().requires_grad_()
    value = reward(x)
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"the reward has shape {tuple(value.shape)}; expected [{len(x)}], a number a sample"
        )
    (slope,) = torch.autograd.grad(value, x, torch.ones_like(value))
    return value.detach(), slope


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """<first, second> of each sample, in at least float32  # [B]"""
    compute = torch.promote_types(first.dtype, torch.float32)
    return (first.to(compute) * second.to(compute)).flatten(1).sum(1)


def _rows(ancestors: Tensor) -> Tensor:
    """Rows of the batch from positions within populations  # [P * M]"""
    populations, count = ancestors.shape
    offset = torch.arange(populations, device=ancestors.device)[:, None] * count
    return (ancestors + offset).flatten()


def _check(
    sigmas: Sequence[float],
    count: int,
    population: int,
    threshold: float,
    stochasticity: float,
    sigma_data: float,
) -> None:
    if len(sigmas) < 3 or sigmas[-1] != 0 or any(a <= b for a, b in pairwise(sigmas)):
        raise ValueError(
            f"sigmas are {list(sigmas)[:3]} ... {list(sigmas)[-2:]}; expected at least two levels "
            "that fall, and 0"
        )
    if population < 1 or count == 0 or count % population:
        raise ValueError(
            f"{count} particles are given, in populations of {population}; expected a multiple"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a share from 0 to 1")
    for name, value in {"stochasticity": stochasticity, "sigma_data": sigma_data}.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}; expected 0 or more")
