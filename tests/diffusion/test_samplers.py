"""Samplers against the closed-form probability-flow ODE of Gaussian data."""

from __future__ import annotations

import pytest
import torch

from fastdistill.diffusion import (
    EDM,
    VP,
    Noise,
    RectifiedFlow,
    deterministic,
    few_step,
    heun,
    karras_sigmas,
)

MEAN, VARIANCE = 0.5, 0.25


def gaussian_denoiser(process):
    """E[x_0 | x_t] for data N(MEAN, VARIANCE) in a process; counts its calls."""

    def denoise(x_t, t):
        denoise.calls += 1
        alpha, sigma = (value.view(-1, 1) for value in process.alpha_sigma(t.double()))
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        return MEAN + gain * (x_t - alpha * MEAN)

    denoise.calls = 0
    return denoise


def exact(start, sigma_max):
    """PF-ODE solution in EDM variables from sigma_max to 0."""
    gain = (VARIANCE / (VARIANCE + sigma_max**2)) ** 0.5
    return MEAN + gain * (start * sigma_max - MEAN)


@pytest.mark.parametrize(
    "process", [EDM(), VP.dit(), RectifiedFlow()], ids=lambda p: type(p).__name__
)
def test_heun_converges_to_the_closed_form_at_second_order(process):
    noise = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    errors = []
    for steps in (32, 64, 128):
        denoise = gaussian_denoiser(process)
        found = heun(denoise, noise, process, karras_sigmas(steps))
        assert denoise.calls == 2 * steps - 1
        errors.append(float((found - exact(noise, 80.0)).abs().max()))
    assert errors[1] < errors[0] / 3
    assert errors[2] < 2e-3


def test_deterministic_few_step_converges_at_first_order():
    noise = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    errors = []
    for steps in (50, 100, 200):
        denoise = gaussian_denoiser(EDM())
        found = deterministic(denoise, noise, EDM(), karras_sigmas(steps))
        assert denoise.calls == steps
        errors.append(float((found - exact(noise, 80.0)).abs().max()))
    assert errors[2] < errors[1] < errors[0] < 0.2


def test_karras_grid_is_the_published_one():
    assert karras_sigmas(18)[:5] == pytest.approx([80, 57.6, 40.8, 28.4, 19.35], rel=2e-3)
    assert karras_sigmas(18)[-2:] == pytest.approx([0.002, 0.0])


def test_one_step_student_denoises_scaled_noise():
    noise, index = Noise(0), torch.arange(4)
    found = few_step(lambda x, t: 2 * x + t.view(-1, 1), EDM(), (2.5,), noise, index, (3,))
    z = noise.normal("latents", index, (3,))
    torch.testing.assert_close(found, 2 * 2.5 * z + 2.5)


@pytest.mark.parametrize(
    ("process", "times"), [(EDM(), (80.0, 2.0, 0.3)), (RectifiedFlow(), (1.0, 0.6, 0.2))], ids=str
)
def test_few_steps_follow_the_exact_recursion_of_the_variance(process, times):
    """Each step contracts by the denoiser's gain and adds the next time's noise."""
    denoise = gaussian_denoiser(process)
    found = few_step(denoise, process, times, Noise(0), torch.arange(20_000), (1,), torch.float64)
    assert denoise.calls == len(times)
    variance = 0.0
    for time in times:
        alpha, sigma = (float(v) for v in process.alpha_sigma(torch.tensor(time).double()))
        noisy = alpha**2 * variance + sigma**2
        variance = (alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)) ** 2 * noisy
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(found.var()) == pytest.approx(variance, rel=0.05)
