"""(a, b) of every parametrisation: the identities between them, in every process."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastdistill.diffusion import (
    EDM,
    VP,
    X0,
    EDMPreconditioning,
    Epsilon,
    Flow,
    RectifiedFlow,
    V,
    convert,
    loss_weight,
)

KINDS = [Epsilon(), V(), X0(), Flow(), EDMPreconditioning(0.5)]
PROCESSES = [EDM(), VP.dit(), VP.stable_diffusion(), RectifiedFlow()]


def name(value):
    return type(value).__name__


def sample(process):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(6, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t = process.time_of_position(torch.linspace(0.1, 0.9, 6, dtype=torch.float64))
    alpha, sigma = process.alpha_sigma(t)
    wide = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1)
    return x0, noise, wide[0] * x0 + wide[1] * noise, alpha, sigma


@pytest.mark.parametrize("process", PROCESSES, ids=name)
def test_predictions_are_what_they_are_called(process):
    x0, noise, x_t, alpha, sigma = sample(process)
    a, s = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1)
    expected = {Epsilon: noise, V: a * noise - s * x0, Flow: noise - x0, X0: x0}
    for kind, value in expected.items():
        found = convert(x0, X0(), kind(), x_t, alpha, sigma)
        torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES, ids=name)
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(KINDS, 2)), ids=name)
def test_round_trips_are_exact(source, target, process):
    value, _, x_t, alpha, sigma = sample(process)
    there = convert(value, source, target, x_t, alpha, sigma)
    back = convert(there, target, source, x_t, alpha, sigma)
    torch.testing.assert_close(back, value, rtol=1e-9, atol=1e-9)


def test_edm_preconditioning_is_karras_table_1():
    sigma, data = torch.tensor([0.01, 0.5, 20.0], dtype=torch.float64), 0.5
    kind, alpha = EDMPreconditioning(data), torch.ones(3, dtype=torch.float64)
    a, b = kind.coefficients(alpha, sigma)
    root = (sigma**2 + data**2).sqrt()
    torch.testing.assert_close(a, data**2 / root**2)
    torch.testing.assert_close(b, sigma * data / root)
    torch.testing.assert_close(kind.input_scale(alpha, sigma), 1 / root)
    torch.testing.assert_close(kind.noise_condition(sigma, alpha, sigma), sigma.log() / 4)
    torch.testing.assert_close(
        loss_weight(kind, alpha, sigma), (sigma**2 + data**2) / (sigma * data) ** 2
    )


def test_edm_network_gives_the_same_denoiser_in_every_process():
    """D depends on x_t / alpha and sigma / alpha alone."""
    kind, ratio = EDMPreconditioning(), torch.tensor([0.3, 2.0], dtype=torch.float64)
    raw = torch.tensor([0.4, -0.7], dtype=torch.float64)
    x = torch.tensor([1.1, -2.0], dtype=torch.float64)
    results = []
    for process in (EDM(), VP.dit(), RectifiedFlow()):
        alpha, sigma = process.alpha_sigma(process.time_of_ratio(ratio))
        a, b = kind.coefficients(alpha, sigma)
        scale = kind.input_scale(alpha, sigma)
        results.append((a * (alpha * x) + b * raw, scale * alpha * x))
    for denoised, model_input in results[1:]:
        torch.testing.assert_close(denoised, results[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model_input, results[0][1], rtol=1e-6, atol=1e-6)


def test_signs_of_score_gaps_flip_between_denoisers_and_noise():
    """Delta = -(sigma / alpha) (eps_psi - eps_phi)."""
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])
    for kind in (Epsilon(), V(), Flow()):
        assert kind.coefficients(alpha, sigma).b < 0
    assert EDMPreconditioning().coefficients(alpha, sigma).b > 0
