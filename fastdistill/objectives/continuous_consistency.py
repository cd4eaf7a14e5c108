"""`ContinuousConsistency`: consistency models of continuous time, sCM (arXiv 2410.11081).

In TrigFlow's clock (`diffusion.clocks.TrigFlow`), y = cos(tau) x_0 + sin(tau) sigma_d eps at
tau = atan(sigma / (alpha sigma_d)) for every process, the consistency function is the student's own
denoiser f = D = cos(tau) y - sin(tau) sigma_d F, which is the identity at tau = 0. Along the
trajectory, dy / dtau = v,

    g    = cos(tau) df^- / dtau
         = -cos^2 (sigma_d F^- - v) - rho cos sin (y + sigma_d dF^- / dtau)
    loss = ||F - F^- - g / (||g|| + offset)||^2 / elements

with F^- the detached F, rho = min(1, step / tangent_warmup), and v the teacher's velocity
(distillation) or the pair's, cos(tau) sigma_d eps - sin(tau) x_0 (training). In terms of D it is
a squared distance to D^- - sigma_d sin(tau) g / (||g|| + offset) over (sigma_d sin(tau))^2.

The paper also learns a weight of each tau. It divides by the mean loss there, which normalised
tangents keep near a constant, so that here every tau weighs alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from fastdistill.choices import LawChoice
from fastdistill.diffusion import LogNormalSigma
from fastdistill.diffusion.clocks import TrigFlow
from fastdistill.models import Denoiser
from fastdistill.objectives.base import Batch, Update
from fastdistill.objectives.denoising import noised_for
from fastdistill.objectives.method import Method, Networks
from fastdistill.objectives.trajectories import (
    DerivativeSettings,
    TrajectoryObjective,
    TrajectorySettings,
    check_derivative,
    velocity_derivative,
    wide,
)
from fastdistill.ops import Distance, consistency_cotangent, log_snr_bin


class TangentSettings(TrajectorySettings, DerivativeSettings):
    """Numbers of consistency in continuous time."""

    consistency_law: LawChoice = LogNormalSigma(-1.0, 1.4)
    """Law of the times at which the consistency function is trained."""
    tangent_warmup: NonNegativeInt = 10_000
    """Steps over which the tangent's unstable part grows in."""
    tangent_offset: float = Field(default=0.1, gt=0)
    """What is added to the tangent's norm before it is divided by it."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the data, which TrigFlow's clock is made for."""


class ContinuousConsistencyMethod(TangentSettings, Method):
    """sCM (arXiv 2410.11081)."""

    name: Literal["continuous_consistency"]
    """continuous_consistency: sCM, trained on data (sCT) or distilled from the teacher (sCD)."""

    def build(self, networks: Networks) -> ContinuousConsistency:
        check_derivative(self.derivative, networks.training.precision)
        return ContinuousConsistency(networks.student, networks.teacher, self, self.guidance_scale)


class ContinuousConsistency(TrajectoryObjective):
    """A consistency function in continuous time.

    Args:
        student: the denoiser that becomes a consistency function.
        teacher: frozen denoiser, whose ODE is followed where ``settings.source`` is teacher.
        settings: numbers of the method.
        guidance_scale: classifier-free guidance of the teacher.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        settings: TangentSettings,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, settings.source, guidance_scale)
        self.settings = settings
        self.clock = TrigFlow(settings.sigma_data)
        self.warmth: Tensor
        device = next(student.parameters()).device
        self.register_buffer("warmth", torch.zeros((), device=device), persistent=False)
        self.before_step(0)

    def before_step(self, step: int) -> None:
        warmup = self.settings.tangent_warmup
        self.warmth.fill_(min(1.0, step / warmup) if warmup else 1.0)

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        settings, student = self.settings, self.student
        law = settings.consistency_law
        level, x_t, model_input = noised_for(student, batch, sample, law, "consistency")
        raw = student.network(model_input, level.noise_condition, batch.condition)
        ratio = level.sigma / level.alpha
        with torch.no_grad():
            a, b = (wide(number, x_t) for number in level.coefficients)
            denoised = a * x_t + b * raw.detach()
            end = self.end(batch, sample, x_t, level.t)
            tangent = self._tangent(batch, ratio, x_t / wide(level.alpha, x_t), denoised, end)
            norm = tangent.flatten(1).norm(dim=1)
            out = settings.sigma_data * self.clock.at(ratio).out
            target = denoised - wide(out / (norm + settings.tangent_offset), x_t) * tangent
        cotangent, loss = consistency_cotangent(
            raw.detach(),
            x_t,
            level.coefficients,
            target,
            distance=Distance.squared_l2(),
            weight=out.square().reciprocal() / sample[0].numel(),
            scale=batch.scale,
        )
        bins = log_snr_bin(level.alpha, level.sigma, self.noise_bins, *self.log_snr_range)
        metrics = {"loss": loss, "tangent": norm}
        return Update([(raw, cotangent)], metrics, bins, ("loss", "tangent"))

    def _tangent(
        self, batch: Batch, ratio: Tensor, x: Tensor, denoised: Tensor, end: Tensor
    ) -> Tensor:
        """g, unnormalised, at x = x_t / alpha  # [B, ...]"""
        moment = self.clock.at(ratio)
        cos, sin = wide(moment.skip, x), wide(moment.out, x)
        rate = wide(moment.rate, x)  # cos sin, which is dtau / d ln lambda
        y = cos * x
        slope = rate * (cos * y - end) / sin
        change = velocity_derivative(
            self.student,
            self.clock,
            y,
            ratio.log(),
            slope,
            batch.condition,
            derivative=self.settings.derivative,
            step=self.settings.derivative_step,
        )
        return -(cos.square() * (end - denoised) / sin) - self.warmth * (rate * y + change)
