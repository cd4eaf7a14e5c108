"""`KnowledgeDistillation`: the student regresses to where the teacher's ODE leads its noise.

    loss = mean over elements of (D_student(s(t0) z, t0, c) - x_teacher(z, c))^2

with z the standard normal noise that the teacher's trajectory began at, t0 the student's first time
and s its starting scale there. DMD2 warms its one-step SDXL student up so, on 10,000 pairs, since
at t0 = 399 the teacher's own network knows nothing of pure noise (arXiv 2405.14867; its code takes
LPIPS of decoded images where this takes the squared error of the samples).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.models import Denoiser
from fastdistill.objectives.base import Batch, Objective, Update
from fastdistill.ops import denoising_cotangent


class KnowledgeDistillation(Objective):
    """Regression of a one-step student to pairs of noise and the teacher's solution.

    Real samples are pairs [B, 2, ...]: the noise, and the solution
    (`fastdistill.engine.pairs.PairData`).

    Args:
        student: the denoiser that is trained.
        time: the student's first time, in its process' clock.
    """

    def __init__(self, student: Denoiser, time: float) -> None:
        super().__init__()
        self.student = student
        self.time = time

    def generate(self, batch: Batch) -> Tensor:
        """The pairs themselves; the student's pass is part of the update."""
        assert batch.real is not None
        return batch.real

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        student = self.student
        noise, solution = sample.unbind(1)
        t = torch.full(batch.index.shape, self.time, device=batch.index.device)
        level = student.level(t)
        shape = (-1, *[1] * (noise.ndim - 1))
        x_t = student.first_input(noise, t)
        scaled = x_t if level.input_scale is None else level.input_scale.reshape(shape) * x_t
        model_input = scaled.to(student.input_dtype or x_t.dtype)
        raw = student.network(model_input, level.noise_condition, batch.condition)
        cotangent, loss = denoising_cotangent(
            raw.detach(), solution, x_t, level.coefficients, scale=batch.scale
        )
        return Update([(raw, cotangent)], {"loss": loss})
