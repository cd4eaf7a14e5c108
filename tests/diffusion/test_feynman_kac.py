"""Feynman-Kac sampling against its own equation, closed forms of Gaussians, and exact mixtures."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from synchronisation import no_synchronisation

from fastdistill.diffusion import (
    EDM,
    VP,
    Noise,
    RectifiedFlow,
    Target,
    feynman_kac,
    gaussian_target,
    karras_sigmas,
    systematic_resampling,
)
from fastdistill.ops import mixture_denoise

sampler = importlib.import_module("fastdistill.diffusion.feynman_kac")

PROCESSES = pytest.mark.parametrize(
    "process", [EDM(), VP.dit(), RectifiedFlow()], ids=lambda p: type(p).__name__
)


def gaussian(process, mean, variance):
    """E[x_0 | x_t] for data N(mean, variance)."""

    def denoise(x_t, t):
        alpha, sigma = (v.to(x_t.dtype).view(-1, 1) for v in process.alpha_sigma(t))
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)

    return denoise


class Mixture:
    """A mixture of one-dimensional Gaussians: denoiser in EDM, and density."""

    def __init__(self, weights, means, variances):
        weights, means, variances = (torch.tensor(v) for v in (weights, means, variances))
        self.parts = means[:, None], variances, weights.log()

    def denoise(self, x, t):
        return mixture_denoise(x, torch.ones_like(t), t, *self.parts).denoised

    def log_density(self, x):
        ones = torch.ones_like(x)
        parts = (part.to(x.dtype) for part in self.parts)
        return mixture_denoise(x[:, None], ones, 0 * ones, *parts).log_density


def plain(target, process):
    """Samples of the mixed score's SDE, as if their weights were alike."""
    index = torch.arange(20_000)
    given = (target, process, karras_sigmas(50), index, (1,))
    found = feynman_kac(*given, threshold=0.0, stochasticity=1.0)
    alike = torch.full_like(found.log_weights, -math.log(len(index)))
    return found._replace(log_weights=alike)


def moments(particles):
    weight = particles.log_weights.double().exp().view(-1, 1)
    mean = (weight * particles.samples).sum()
    return float(mean), float((weight * (particles.samples - mean) ** 2).sum())


@pytest.mark.parametrize("tilted", [False, True], ids=["", "reward"])
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_drift_noise_and_weights_solve_the_targets_equation(factors, tilted):
    """d log p = -div u - u s + zeta^2/2 (div s + s^2) + w - E w, on random Gaussians."""
    draw = np.random.default_rng()
    means, variances = draw.uniform(-1, 1, factors), draw.uniform(0.4, 1.5, factors)
    betas = tuple(draw.uniform(0.5, 2.0, factors))
    sigma, zeta2, sigma_data = draw.uniform((0.3, 0.0, 0.0), (3.0, 4.0, 1.0))
    height, bent = draw.uniform(-1, 1) * tilted, draw.uniform(0, 0.5) * tilted
    denoisers = tuple(gaussian(EDM(), *pair) for pair in zip(means, variances, strict=True))

    def reward(x):
        return (height * x - bent * x**2)[:, 0]

    target = Target(denoisers, betas, reward if tilted else None)
    evaluate = [
        lambda x, level, d=d: d(x, torch.full((len(x),), level, dtype=torch.float64))
        for d in denoisers
    ]

    def exact(v):
        """Precision and precision times mean at lambda^2 = v."""
        precision = sum(b / (c + v) for b, c in zip(betas, variances, strict=True))
        pulled = sum(b * m / (c + v) for b, m, c in zip(betas, means, variances, strict=True))
        return precision + 2 * bent / (1 + v), pulled + height / (1 + v)

    def log_density(x, v):
        precision, pulled = exact(v)
        return 0.5 * math.log(precision) - 0.5 * precision * (x - pulled / precision) ** 2

    h = 1e-8

    def rates(x):
        """Drift, noise and weight for a unit of lambda^2, out of a short step."""
        after = math.sqrt(sigma**2 - h)
        before = sampler._evaluate(target, evaluate, sigma_data, x, sigma)
        nu = math.hypot(sigma, sigma_data), math.hypot(after, sigma_data)
        step = sampler._step(*nu, target.total, zeta2)
        moved = sampler._predicted(step, x, before, torch.zeros_like(x))
        there = sampler._evaluate(target, evaluate, sigma_data, x, after)
        gained = sampler._gained(before, there, sigma, after)
        return (moved - x) / h, step.spread**2 / h, gained[:, None] / h

    v = sigma**2
    precision, pulled = exact(v)
    x = pulled / precision + torch.linspace(-8, 8, 801).double()[:, None] / math.sqrt(precision)
    u, noise, w = rates(x)
    divergence = (rates(x + 1)[0] - rates(x - 1)[0]) / 2  # the drift is linear here
    score = pulled - precision * x
    change = (log_density(x, v - 1e-4) - log_density(x, v + 1e-4)) / 2e-4
    p = torch.softmax(log_density(x, v), 0)
    residual = change + divergence + u * score - 0.5 * noise * (score**2 - precision)
    residual = residual - (w - (p * w).sum())
    assert noise == pytest.approx(zeta2, rel=1e-4)
    near = p > 1e-4 * p.max()
    scale = max(1.0, float((w - (p * w).sum())[near].abs().max()))
    assert float(residual[near].abs().max()) < 3e-5 * scale


@PROCESSES
def test_weights_are_the_papers_in_the_process_own_clock(process):
    """dw = 1/2 g^2 (|sum b s|^2 - sum b |s|^2) dt, g^2 = d sigma^2/dt - 2 sigma^2 d ln alpha/dt."""
    draw = np.random.default_rng()
    pairs = list(zip(draw.uniform(-1, 1, 2), draw.uniform(0.4, 1.5, 2), strict=True))
    scale = draw.uniform(1.5, 4.0)
    target = Target(tuple(gaussian(process, *pair) for pair in pairs), (1 - scale, scale))
    t = process.time_of_ratio(torch.tensor([draw.uniform(0.3, 3.0)], dtype=torch.float64))
    t = t.floor() + 0.5 if isinstance(process, VP) else t  # within one piece of the table

    def level(t):
        return [float(value) for value in process.alpha_sigma(t)]

    h = 1e-5
    (alpha, sigma), after, before = level(t), level(t + h), level(t - h)
    growth = (math.log(after[0]) - math.log(before[0])) / (2 * h)
    g2 = (after[1] ** 2 - before[1] ** 2) / (2 * h) - 2 * sigma**2 * growth
    x_t = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    total = [alpha**2 * variance + sigma**2 for _, variance in pairs]
    s = [(alpha * m - x_t) / v for (m, _), v in zip(pairs, total, strict=True)]
    square = ((1 - scale) * s[0] + scale * s[1]) ** 2
    papers = 0.5 * g2 * (square - (1 - scale) * s[0] ** 2 - scale * s[1] ** 2)

    evaluate = [lambda x, _, d=d: d(alpha * x, t.expand(len(x))) for d in target.denoisers]
    rate = sampler._evaluate(target, evaluate, 0.5, x_t / alpha, sigma / alpha).rate
    ratios = after[1] / after[0], before[1] / before[0]
    clock = (math.log(ratios[0]) - math.log(ratios[1])) / (2 * h)
    torch.testing.assert_close(rate * clock, papers[:, 0], rtol=1e-5, atol=1e-9)


@PROCESSES
def test_product_of_two_gaussians(process):
    target = Target((gaussian(process, -0.7, 0.6), gaussian(process, 1.1, 1.5)), (1.0, 1.0))
    found = feynman_kac(target, process, karras_sigmas(50), torch.arange(20_000), (1,))
    mean, variance = gaussian_target(
        torch.tensor([[-0.7], [1.1]]), torch.tensor([[[0.6]], [[1.5]]]), target.exponents
    )
    assert (float(mean), float(variance)) == pytest.approx((-0.18571, 0.428571), abs=1e-5)
    assert moments(found) == pytest.approx((float(mean), float(variance)), abs=0.03)
    assert float(plain(target, process).samples.var()) < 0.35


def test_guided_gaussians_match_the_closed_form_and_plain_guidance_does_not():
    scale, means, variances = 2.5, torch.tensor([[1.1], [-0.7]]), torch.tensor([1.5, 0.6])
    target = Target((gaussian(EDM(), 1.1, 1.5), gaussian(EDM(), -0.7, 0.6)), (1 - scale, scale))
    found = feynman_kac(target, EDM(), karras_sigmas(50), torch.arange(20_000), (1,))
    mean, variance = gaussian_target(means, variances[:, None, None], target.exponents)
    assert moments(found) == pytest.approx((float(mean), float(variance)), abs=0.03)
    assert float(plain(target, EDM()).samples.mean()) < float(mean) - 0.1


def test_a_quadratic_reward_tilts_a_gaussian_exactly():
    """N(0.5, 0.8) times exp(1.2 x - 0.6 x^2)."""
    target = Target((gaussian(EDM(), 0.5, 0.8),), (1.0,), lambda x: (1.2 * x - 0.6 * x**2)[:, 0])
    found = feynman_kac(target, EDM(), karras_sigmas(50), torch.arange(20_000), (1,))
    precision = 1 / 0.8 + 1.2
    expected = (0.5 / 0.8 + 1.2) / precision, 1 / precision
    assert moments(found) == pytest.approx(expected, abs=0.02)


BOTH = Mixture([0.5, 0.5], [-1.0, 1.0], [0.25, 0.25])
RIGHT = Mixture([0.15, 0.85], [-1.0, 1.0], [0.25, 0.25])
MIXTURES = {
    "annealed": ((Mixture([0.35, 0.65], [-1.2, 0.9], [0.25, 0.09]),), (2.0,)),
    "guided": ((BOTH, RIGHT), (-2.0, 3.0)),
}


def distance(mixtures, betas, found):
    """Kolmogorov-Smirnov distance of weighted particles from the exact density."""
    x = torch.linspace(-6, 6, 4001).double()
    log_p = sum(beta * m.log_density(x) for beta, m in zip(betas, mixtures, strict=True))
    exact = log_p.softmax(0).cumsum(0)
    place, order = found.samples[:, 0].double().sort()
    weight = found.log_weights.double().exp().flatten()[order].cumsum(0)
    reached = torch.searchsorted(place, x, right=True)
    return float((torch.cat([torch.zeros(1), weight])[reached] - exact).abs().max())


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_have_the_exact_density_and_plain_samples_do_not(name):
    mixtures, betas = MIXTURES[name]
    target = Target(tuple(m.denoise for m in mixtures), betas)
    found = feynman_kac(target, EDM(), karras_sigmas(50), torch.arange(20_000), (1,))
    assert distance(mixtures, betas, found) < 0.03
    assert distance(mixtures, betas, plain(target, EDM())) > 0.05


@pytest.mark.parametrize("stochasticity", [1.0, 4.0])
def test_the_target_does_not_depend_on_the_noise_that_is_injected(stochasticity):
    mixtures, betas = MIXTURES["guided"]
    target = Target(tuple(m.denoise for m in mixtures), betas)
    found = feynman_kac(
        target,
        EDM(),
        karras_sigmas(50),
        torch.arange(20_000),
        (1,),
        stochasticity=stochasticity,
    )
    assert distance(mixtures, betas, found) < 0.04


def test_one_denoiser_without_weights_is_a_sampler_of_the_data():
    target = Target((gaussian(VP.dit(), 0.5, 0.25),), (1.0,))
    found = feynman_kac(target, VP.dit(), karras_sigmas(20), torch.arange(20_000), (1,))
    assert torch.all(found.effective_sample_size > 0.9999)
    assert moments(found) == pytest.approx((0.5, 0.25), abs=0.01)


def test_steps_are_exact_for_data_of_the_standard_deviation_that_is_given():
    target = Target((gaussian(EDM(), 0.5, 0.25),), (1.0,))
    found = feynman_kac(target, EDM(), karras_sigmas(2), torch.arange(20_000), (1,), sigma_data=0.5)
    assert moments(found) == pytest.approx((0.5, 0.25), abs=0.01)


def test_particles_start_with_the_variance_of_the_target_at_high_noise():
    target = Target((lambda x_t, t: x_t,) * 2, (1.5, 0.75))  # without a score nothing moves
    index = torch.arange(20_000)
    found = feynman_kac(target, EDM(), [80.0, 79.0, 0.0], index, (1,), stochasticity=0.0)
    assert float(found.samples.var()) == pytest.approx(80**2 / 2.25, rel=0.03)


def test_populations_are_independent_and_known_by_their_index():
    mixtures, betas = MIXTURES["guided"]
    target = Target(tuple(m.denoise for m in mixtures), betas)

    def sample(index):
        return feynman_kac(target, EDM(), karras_sigmas(8), index, (1,), population=50, threshold=1)

    both, second = sample(torch.arange(100)), sample(torch.arange(50, 100))
    torch.testing.assert_close(both.samples[50:], second.samples)
    torch.testing.assert_close(both.log_weights[1:], second.log_weights)
    assert both.effective_sample_size.shape == (8, 2)
    assert not torch.equal(both.samples[:50], both.samples[50:])


def test_the_host_waits_for_nothing():
    mixtures, betas = MIXTURES["guided"]
    target = Target(tuple(m.denoise for m in mixtures), betas, lambda x: x[:, 0])
    index = torch.arange(100)
    with no_synchronisation():
        feynman_kac(target, EDM(), karras_sigmas(4), index, (1,), population=50).equally_weighted()


def test_systematic_resampling_rounds_each_weight_down_or_up():
    log_weights = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)) * 2
    uniform = Noise(0).uniform("test", torch.arange(3))
    ancestors = systematic_resampling(log_weights, uniform)
    for row, weights in zip(ancestors, 100 * log_weights.softmax(1), strict=True):
        children = torch.bincount(row, minlength=100)
        assert torch.all(children >= weights.floor() - 1e-3)
        assert torch.all(children <= weights.ceil() + 1e-3)
        assert torch.equal(row, row.sort().values)


def test_resampling_is_unbiased_over_its_uniform_number():
    weights = torch.tensor([[0.07, 0.41, 0.22, 0.3]])
    uniform = (torch.arange(1000) + 0.5) / 1000
    ancestors = systematic_resampling(weights.log().expand(1000, 4), uniform)
    share = torch.bincount(ancestors.flatten(), minlength=4) / 4000
    torch.testing.assert_close(share, weights[0], atol=1e-3, rtol=0)


def test_equally_weighted_particles_have_the_weighted_mean():
    target = Target((gaussian(EDM(), -0.7, 0.6), gaussian(EDM(), 1.1, 1.5)), (1.0, 1.0))
    found = feynman_kac(
        target, EDM(), karras_sigmas(20), torch.arange(4000), (1,), threshold=0.0, population=2000
    )
    mean = (found.log_weights.exp() * found.samples.view(2, -1)).sum(1)
    again = found.equally_weighted().view(2, -1).mean(1)
    torch.testing.assert_close(again, mean, atol=0.01, rtol=0)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_gaussian_targets_that_cannot_be_normalised_are_refused(sigma):
    means, covariances = torch.zeros(2, 2), torch.stack([torch.eye(2) * 0.5, torch.eye(2) * 2])
    with pytest.raises(ValueError, match=r"cannot be normalised at sigma 0.*eigenvalue -"):
        gaussian_target(means, covariances, (-2.0, 3.0), sigma)
    mean, covariance = gaussian_target(means, covariances, (-2.0, 3.0), sigma=3.0)
    assert torch.all(torch.linalg.eigvalsh(covariance) > 0)
    assert torch.all(mean == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": [80.0, 1.0]}, "expected at least two levels"),
        ({"sigmas": [1.0, 80.0, 0.0]}, "that fall, and 0"),
        ({"population": 3}, "expected a multiple"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"stochasticity": -0.1}, "stochasticity is -0.1"),
        ({"sigma_data": float("nan")}, "sigma_data is nan"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    target = Target((gaussian(EDM(), 0.0, 1.0),), (1.0,))
    given = {"sigmas": karras_sigmas(3), "index": torch.arange(10), "shape": (1,)} | arguments
    with pytest.raises(ValueError, match=message):
        feynman_kac(target, EDM(), **given)


def test_exponents_of_no_density_are_refused():
    denoise = gaussian(EDM(), 0.0, 1.0)
    with pytest.raises(ValueError, match="one exponent for each denoiser"):
        Target((denoise,), (1.0, 2.0))
    with pytest.raises(ValueError, match="sum to -1"):
        Target((denoise, denoise), (1.0, -2.0))
    whole = Target((denoise,), (1.0,), lambda x: x)
    with pytest.raises(ValueError, match=r"reward has shape \(10, 1\)"):
        feynman_kac(whole, EDM(), karras_sigmas(3), torch.arange(10), (1,))
