"""Processes against published constants, diffusers' schedulers, and their own inverses."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill.diffusion import EDM, VP, RectifiedFlow

PROCESSES = [EDM(), VP.dit(), VP.stable_diffusion(), RectifiedFlow(), RectifiedFlow(shift=3.0)]

# Index, alpha, sigma, from the models' published betas.
CONSTANTS = {
    VP.stable_diffusion(): [
        (0, 0.999575, 0.029155),
        (399, 0.652753, 0.757571),
        (999, 0.068265, None),
    ],
    VP.dit(): [(0, 0.999950, 0.01), (399, 0.441754, 0.897136), (999, 0.006353, None)],
}


@pytest.mark.parametrize("process", CONSTANTS, ids=lambda process: process.spacing)
def test_published_constants(process):
    for index, alpha, sigma in CONSTANTS[process]:
        found = process.alpha_sigma(torch.tensor(float(index), dtype=torch.float64))
        assert float(found.alpha) == pytest.approx(alpha, abs=1e-6)
        if sigma is not None:
            assert float(found.sigma) == pytest.approx(sigma, abs=1e-6)
    few_steps = torch.tensor([999.0, 749.0, 499.0, 249.0], dtype=torch.float64)
    alpha, sigma = VP.stable_diffusion().alpha_sigma(few_steps)
    expected = [14.6146, 4.0817, 1.6129, 0.6932]
    assert (sigma / alpha).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("process", "spacing"),
    [(VP.dit(), "linear"), (VP.stable_diffusion(), "scaled_linear")],
)
def test_vp_equals_diffusers_at_every_index(process, spacing):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        beta_start=process.beta_start, beta_end=process.beta_end, beta_schedule=spacing
    )
    alpha, sigma = process.alpha_sigma(torch.arange(1000).double())
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000).double())


def test_shift_equals_diffusers_flow_match_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    position = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(
        RectifiedFlow(3.0).time_of_position(position), scheduler.sigmas[:1000]
    )


def test_dynamic_shift_has_flux_values():
    assert RectifiedFlow.for_tokens(1024).shift == pytest.approx(1.878, abs=1e-3)
    assert RectifiedFlow.for_tokens(4096).shift == pytest.approx(3.158, abs=1e-3)
    assert RectifiedFlow.for_tokens(256).shift == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_time_of_ratio_inverts_alpha_sigma(process):
    position = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    t = process.time_of_position(position)
    alpha, sigma = process.alpha_sigma(t)
    torch.testing.assert_close(process.time_of_ratio(sigma / alpha), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_noise_grows_along_the_grid(process):
    t = process.time_of_position(torch.linspace(0.001, 0.999, 500, dtype=torch.float64))
    alpha, sigma = process.alpha_sigma(t)
    ratio = sigma / alpha
    assert (ratio[1:] >= ratio[:-1]).all()
    assert ratio[0] < 0.05 < 5 < ratio[-1]


def test_vp_between_indices_stays_variance_preserving_and_monotone():
    t = torch.linspace(0, 999, 5000, dtype=torch.float64)
    alpha, sigma = VP.stable_diffusion().alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5000).double())
    assert (sigma[1:] > sigma[:-1]).all()


def test_integer_times_are_accepted():
    process = VP.dit()
    whole = process.alpha_sigma(torch.tensor([5, 999]))
    torch.testing.assert_close(whole.alpha, process.alpha_sigma(torch.tensor([5.0, 999.0])).alpha)
