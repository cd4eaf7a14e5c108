"""Knowledge distillation: its gradient against a closed form, and its fixed point."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdistill.diffusion import EDM, VP, EDMPreconditioning, Epsilon, Noise
from fastdistill.models import Denoiser
from fastdistill.objectives import Batch, KnowledgeDistillation


class Affine(nn.Module):
    """F = m + s x, one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.s = nn.Parameter(torch.tensor(-0.7, dtype=torch.float64))

    def forward(self, model_input, noise_condition, condition):
        return self.m + self.s * model_input


def pairs(count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, 3, 2, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("process", "parametrisation", "time"),
    [
        (VP.stable_diffusion(), Epsilon(), 399.0),
        (EDM(), EDMPreconditioning(), 80.0),
    ],
)
def test_the_gradient_is_that_of_the_squared_distance_to_the_solution(
    process, parametrisation, time
):
    network = Affine()
    student = Denoiser(network, process, parametrisation)
    real, index = pairs(), torch.arange(5)
    batch = Batch(index, Noise(0), 1 / 5, (3, 2, 2), real)
    objective = KnowledgeDistillation(student, time)
    update = objective.student_update(batch, objective.generate(batch))
    update.backward()
    found = network.m.grad.clone(), network.s.grad.clone()

    network.zero_grad()
    t = torch.full((5,), time)
    x_t = process.start_scale(t).double().reshape(-1, 1, 1, 1) * real[:, 0]
    loss = (student(x_t, t) - real[:, 1]).square().mean(dim=(1, 2, 3))
    loss.mean().backward()
    torch.testing.assert_close(update.metrics["loss"].double(), loss.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[0], network.m.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[1], network.s.grad, rtol=1e-5, atol=1e-7)


def test_a_student_that_is_there_stays_there():
    student = Denoiser(Affine(), VP.stable_diffusion(), Epsilon())
    real, t = pairs(), torch.full((5,), 399.0)
    real[:, 1] = student(real[:, 0], t).detach()
    batch = Batch(torch.arange(5), Noise(0), 1 / 5, (3, 2, 2), real)
    KnowledgeDistillation(student, 399.0).student_update(batch, real).backward()
    assert student.network.m.grad.abs() < 1e-6
    assert student.network.s.grad.abs() < 1e-6
