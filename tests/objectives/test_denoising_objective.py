"""`Denoising`: EDM's loss as published, other spaces, and dropped conditions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdistill.diffusion import EDM, X0, EDMPreconditioning, FixedList, LogNormalSigma, Noise
from fastdistill.models import Denoiser
from fastdistill.objectives import Batch, Denoising


class Scaled(nn.Module):
    """F = factor * input + condition."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, model_input, noise_condition, condition):
        shift = 0 if condition is None else condition.view(-1, 1).float()
        return self.factor * model_input + shift


def batch(count: int = 256, **changes) -> Batch:
    real = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return Batch(torch.arange(count), Noise(0), 1 / count, (3,), real, **changes)


@pytest.mark.parametrize("space", [EDMPreconditioning(), X0()])
def test_loss_and_gradient_are_those_of_the_formula(space):
    """mean of (sigma^2 + s^2) / (sigma s)^2 (D - x)^2 for EDM, 1 (D - x)^2 in x0 space."""
    denoiser, at = Denoiser(Scaled(), EDM(), EDMPreconditioning()), batch()
    method = Denoising(denoiser, LogNormalSigma(), space)
    update = method.student_update(at, method.generate(at))
    update.backward()
    sigma = LogNormalSigma().sample(EDM(), at.noise, "denoising-t", at.index)
    x_t = at.real + sigma.view(-1, 1) * at.noise.normal("denoising-noise", at.index, (3,))
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 if space != X0() else torch.ones(256)
    squared = (denoiser(x_t, sigma) - at.real).square().mean(1)
    expected = (weight * squared).mean()
    (gradient,) = torch.autograd.grad(expected, denoiser.network.factor)
    torch.testing.assert_close(update.metrics["loss"].mean(), expected.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(denoiser.network.factor.grad, gradient, rtol=1e-4, atol=0)


def test_a_share_of_the_conditions_is_dropped():
    seen = []

    class Spy(Scaled):
        def forward(self, model_input, noise_condition, condition):
            seen.append(condition)
            return super().forward(model_input, noise_condition, condition)

    labels = torch.zeros(4000, dtype=torch.int64)
    at = batch(4000, condition=labels, uncondition=labels + 10)
    method = Denoising(Denoiser(Spy(), EDM(), X0()), FixedList((0.5,)), condition_dropout=0.1)
    method.student_update(at, method.generate(at))
    assert set(seen[0].tolist()) == {0, 10}
    assert float((seen[0] == 10).float().mean()) == pytest.approx(0.1, abs=0.02)
