"""`ExactDenoiser`: a role like any other, and the closed forms that other methods are held to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion import (
    EDM,
    VP,
    EDMPreconditioning,
    GaussianMixture,
    RectifiedFlow,
    heun,
    karras_sigmas,
)
from fastdistill.models import Denoiser, ExactDenoiser
from fastdistill.models.digits import DigitsNetwork

CASES = [
    pytest.param(EDM(), 2.0, 0.4, id="edm"),
    pytest.param(VP.dit(), 700.0, 150.0, id="vp"),
    pytest.param(RectifiedFlow(), 0.8, 0.25, id="flow"),
]


def at(time: float, count: int = 5) -> Tensor:
    return torch.full((count,), time, dtype=torch.float64)


def gaussian(d: int = 3) -> GaussianMixture:
    """A random mean and random correlated covariance, another in every run."""
    generator = torch.Generator()
    generator.seed()
    factor = torch.randn(d, d, generator=generator, dtype=torch.float64)
    covariance = factor @ factor.T + 0.2 * torch.eye(d, dtype=torch.float64)
    mean = torch.randn(1, d, generator=generator, dtype=torch.float64)
    return GaussianMixture(mean, covariance[None], dtype=torch.float64)


def ring() -> GaussianMixture:
    angle = torch.arange(5, dtype=torch.float64) * 1.2566
    means = torch.stack((angle.cos(), angle.sin()), 1)
    return GaussianMixture(means, torch.full((5, 2), 0.02), dtype=torch.float64)


@pytest.mark.parametrize(("process", "t", "r"), CASES)
def test_a_gaussian_denoiser_is_the_affine_map(process, t, r):
    """D = mu + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha mu), s = -(...)^-1 (x - alpha mu)."""
    data = gaussian()
    teacher = ExactDenoiser(data, process)
    alpha, sigma = (float(v) for v in process.alpha_sigma(at(t, 1)))
    x = torch.randn(5, 3, dtype=torch.float64)
    spread = alpha**2 * data.covariances[0] + sigma**2 * torch.eye(3, dtype=torch.float64)
    score = -torch.linalg.solve(spread, (x - alpha * data.means).T).T
    torch.testing.assert_close(teacher.score(x, at(t)), score)
    denoised = data.means - alpha * (score @ data.covariances[0])
    torch.testing.assert_close(teacher(x, at(t)), denoised)
    level = teacher.level(at(t))
    torch.testing.assert_close(teacher.network(x, level.noise_condition, None), denoised)


@pytest.mark.parametrize(("process", "t", "r"), CASES)
@pytest.mark.parametrize("data", [gaussian(), ring()], ids=["gaussian", "mixture"])
def test_the_consistency_function_does_not_change_along_a_trajectory(data, process, t, r):
    """T10: f(x_t, t) = f(x_r, r), and the total derivative of f along the flow is zero."""
    teacher = ExactDenoiser(data, process)
    alpha, sigma = (float(v) for v in process.alpha_sigma(at(t, 1)))
    d = data.dimensions
    x = alpha * data.means[:1] + sigma * torch.randn(5, d, dtype=torch.float64)
    clean = teacher.consistency(x, at(t))
    earlier = teacher.transport(x, at(t), at(r))
    torch.testing.assert_close(teacher.consistency(earlier, at(r)), clean, rtol=1e-5, atol=1e-6)
    h = 1e-3 * t
    step = teacher.transport(x, at(t), at(t - h))
    tangent = (teacher.consistency(step, at(t - h)) - clean) / h
    assert tangent.abs().max() < 1e-4 / h * 1e-2


def test_the_consistency_function_of_a_gaussian_in_closed_form():
    """EDM: f(x, sigma) = mu + sqrt(lambda / (lambda + sigma^2)) (x - mu)."""
    data = GaussianMixture(torch.tensor([[0.4]]), torch.tensor([[0.7]]), dtype=torch.float64)
    teacher = ExactDenoiser(data, EDM())
    x = torch.linspace(-3, 3, 5, dtype=torch.float64)[:, None]
    expected = 0.4 + (0.7 / (0.7 + 1.5**2)) ** 0.5 * (x - 0.4)
    torch.testing.assert_close(teacher.consistency(x, at(1.5)), expected, rtol=1e-6, atol=1e-6)


def test_the_average_velocity_of_meanflow():
    """METHODS 9: mu .4, lambda .7, x .9, t .8, r .25: u = -0.141243, and v = 0.410180 at r -> t."""
    data = GaussianMixture(
        torch.tensor([[0.4]], dtype=torch.float64),
        torch.tensor([[0.7]], dtype=torch.float64),
        dtype=torch.float64,
    )
    teacher = ExactDenoiser(data, RectifiedFlow())
    x = torch.tensor([[0.9]], dtype=torch.float64)
    u = teacher.average_velocity(x, at(0.8, 1), at(0.25, 1))
    assert float(u) == pytest.approx(-0.141243, abs=1e-6)
    near = teacher.average_velocity(x, at(0.8, 1), at(0.8 - 1e-6, 1))
    assert float(near) == pytest.approx(0.410180, abs=1e-5)


def test_average_velocity_satisfies_the_meanflow_identity():
    """u + (t - r) du/dt = v along the flow, for a mixture (arXiv 2505.13447, equation 6)."""
    teacher = ExactDenoiser(ring(), RectifiedFlow())
    x = torch.randn(5, 2, dtype=torch.float64)
    t, r, h = 0.7, 0.3, 1e-4
    u = teacher.average_velocity(x, at(t), at(r))
    ahead, behind = (teacher.transport(x, at(t), at(t + s)) for s in (h, -h))
    slope = teacher.average_velocity(ahead, at(t + h), at(r))
    slope = (slope - teacher.average_velocity(behind, at(t - h), at(r))) / (2 * h)
    velocity = (x - teacher(x, at(t))) / t  # eps - x_0
    torch.testing.assert_close(u + (t - r) * slope, velocity, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("process", "t", "r"), CASES)
def test_a_sampler_draws_from_the_exact_teacher_as_from_any(process, t, r):
    """Heun's ends near the flow's own end, from the same noise."""
    teacher = ExactDenoiser(ring().float(), process)
    z = torch.randn(20, 2)
    sigmas = karras_sigmas(60, 0.01, 20.0)
    samples = heun(teacher, z, process, sigmas)
    time = process.time_of_ratio(torch.full((20,), 20.0))
    alpha = process.alpha_sigma(time).alpha[:, None]
    exact = teacher.consistency(20.0 * alpha * z, time)
    assert (samples - exact).norm(dim=1).median() < 0.02


def test_features_are_those_of_the_trained_denoiser():
    torch.manual_seed(0)
    network = DigitsNetwork((2,), 0, width=16, blocks=2)
    trained = Denoiser(network, EDM(), EDMPreconditioning())
    teacher = ExactDenoiser(ring().float(), EDM(), trained)
    x, t = torch.randn(4, 2), torch.tensor([0.1, 0.5, 1.0, 3.0])
    level = trained.level(t)
    assert level.input_scale is not None
    expected = network.features(level.input_scale[:, None] * x, level.noise_condition, None)
    denoised, found = teacher.network.forward_with_features(x, t, None)
    assert teacher.network.feature_shapes == network.feature_shapes
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(denoised, teacher(x, t))


def test_exact_scores_alone_have_no_features():
    teacher = ExactDenoiser(ring(), EDM())
    with pytest.raises(ValueError, match="have no features for a discriminator"):
        _ = teacher.network.feature_shapes


def test_the_input_has_a_gradient_and_the_teacher_no_parameters():
    teacher = ExactDenoiser(ring(), EDM())
    assert not list(teacher.parameters())
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: teacher(x, at(0.4, 3)), (x,))
