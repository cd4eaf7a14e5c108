"""Distribution matching of every diffusers architecture, guided and with a GAN term."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, Prompts, objective_of, tiny_denoiser

from fastdistill.diffusion import Noise
from fastdistill.objectives import Batch


@pytest.mark.parametrize("family", FAMILIES)
def test_one_update_of_student_and_critic(family):
    teacher = tiny_denoiser(family)
    student, critic = copy.deepcopy(teacher), copy.deepcopy(teacher)
    guided = family not in ("unet", "flux")  # one has no condition, one was distilled with guidance
    objective = objective_of(teacher, student, critic, guided, "jensen_shannon")
    data, index = Prompts(teacher), torch.arange(4)
    noise = Noise(3).at(0)
    batch = Batch(index, noise, 0.25, data.shape, *data.batch(0, 0, 4))
    sample = objective.generate(batch)
    update = objective.student_update(batch, sample)
    update.backward()
    moved = [p.grad for p in student.parameters() if p.grad is not None]
    assert sum(gradient.abs().sum() for gradient in moved) > 0
    assert all(torch.isfinite(gradient).all() for gradient in moved)
    assert update.metrics["nonfinite"].sum() == 0
    assert not any(p.grad is not None for p in teacher.parameters())
    critic.zero_grad()
    update = objective.critic_update(batch, sample.detach())
    update.backward()
    assert all(torch.isfinite(value).all() for value in update.metrics.values())
    assert sum(p.grad.abs().sum() for p in critic.parameters() if p.grad is not None) > 0


def test_guidance_in_one_forward_is_guidance_in_two():
    teacher = tiny_denoiser("sdxl")
    objective = objective_of(teacher, teacher, copy.deepcopy(teacher), True, "reverse_kl")
    data = Prompts(teacher)
    batch = Batch(torch.arange(4), Noise(3), 0.25, data.shape, *data.batch(0, 0, 4))
    level = teacher.level(torch.tensor([20.0, 300.0, 500.0, 990.0]))
    assert batch.real is not None
    found = objective._with_and_without(teacher, level, batch.real, batch)
    for raw, condition in zip(found, (batch.condition, batch.uncondition), strict=True):
        expected = teacher.network(batch.real, level.noise_condition, condition)
        torch.testing.assert_close(raw, expected, rtol=1e-4, atol=1e-5)
