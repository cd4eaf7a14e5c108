"""`MeanFlow`: a student of average velocities, which leads from any time to any other.

In rectified flow's clock (`diffusion.clocks.LinearFlow`), y = (1 - s) x_0 + s eps at s = sigma /
(alpha + sigma) for every process, the average velocity u(y, r, s) = (y_s - y_r) / (s - r) obeys

    u = v - (s - r) du / ds        along dy / ds = v

which is what the student is trained to (MeanFlow, arXiv 2505.13447), with the right side detached:

    loss = ||u - sg[v - (s - r) du / ds]||^2 / sg(||.||^2 + adaptive_offset)^adaptive_power

v is the teacher's velocity (distillation) or eps - x_0 (training). In terms of the student's
denoiser, D = y - s u leads to r = 0, and at r = s it is the teacher's kind: E[x_0 | x_t]. A student
that starts as the teacher's copy knows r = s alone, and its answer is the same for every r.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from fastdistill.choices import LawChoice
from fastdistill.diffusion import LogNormalSigma
from fastdistill.diffusion.clocks import LinearFlow
from fastdistill.models import Denoiser
from fastdistill.objectives.base import Batch, Update
from fastdistill.objectives.denoising import noised_at
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


class MeanFlowMethod(TrajectorySettings, DerivativeSettings, Method):
    """MeanFlow (arXiv 2505.13447)."""

    name: Literal["mean_flow"]
    """mean_flow: average velocities; the student's network is given a second time."""
    time_law: LawChoice = LogNormalSigma(-0.4, 1.0)
    """Law of both times; log-normal in sigma / alpha is logit-normal in flow time."""
    different_times: float = Field(default=0.25, ge=0, le=1)
    """Share of the samples whose two times differ; the others train the instantaneous velocity."""
    adaptive_power: float = Field(default=1.0, ge=0)
    """Power of the squared error that a sample's loss is divided by."""
    adaptive_offset: PositiveFloat = 0.01
    """What is added to the squared error before."""

    def build(self, networks: Networks) -> MeanFlow:
        check_derivative(self.derivative, networks.training.precision)
        networks.student.add_second_time()
        return MeanFlow(networks.student, networks.teacher, self)


class MeanFlow(TrajectoryObjective):
    """A student of average velocities.

    Args:
        student: a denoiser of two times (`Denoiser.add_second_time`).
        teacher: frozen denoiser, whose ODE is followed where ``settings.source`` is teacher.
        settings: numbers of the method.

    Raises:
        ValueError: for a student of one time.
    """

    def __init__(self, student: Denoiser, teacher: Denoiser, settings: MeanFlowMethod) -> None:
        super().__init__(student, teacher, settings.source, settings.guidance_scale)
        if not student.two_times:
            raise ValueError("the student has one time; call add_second_time() of it first")
        self.settings = settings
        self.clock = LinearFlow()

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        settings, student = self.settings, self.student
        t, until = self._times(batch)
        level = student.level(t, until)
        _, x_t, model_input = noised_at(student, level, batch, sample, "mean-flow")
        raw = student.network(model_input, level.noise_condition, batch.condition)
        ratio = level.sigma / level.alpha
        moment = self.clock.at(ratio)
        with torch.no_grad():
            end = self.end(batch, sample, x_t, t)
            y = wide(moment.scale / level.alpha, x_t) * x_t
            change = velocity_derivative(
                student,
                self.clock,
                y,
                ratio.log(),
                wide(moment.scale, x_t) * (y - end),  # rate v = s (1 - s) (y - end) / s
                batch.condition,
                until,
                derivative=settings.derivative,
                step=settings.derivative_step,
            )
            # y - s u_target, where du / ds = change / (s (1 - s))
            target = end + wide((moment.time - until) / moment.scale, x_t) * change
        cotangent, error = consistency_cotangent(
            raw.detach(),
            x_t,
            level.coefficients,
            target,
            distance=Distance.squared_l2(),
            weight=moment.time.square().reciprocal(),
            scale=batch.scale,
        )
        weight = (error + settings.adaptive_offset) ** -settings.adaptive_power
        bins = log_snr_bin(level.alpha, level.sigma, self.noise_bins, *self.log_snr_range)
        pair = (raw, (wide(weight, cotangent) * cotangent).to(raw.dtype))
        metrics = {"loss": weight * error, "error": error}
        return Update([pair], metrics, bins, ("error",))

    def _times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """t, the later of two times of the law, and the flow time of the earlier, or of t."""
        process, law, noise = self.student.process, self.settings.time_law, batch.noise
        drawn = [law.sample(process, noise, f"mean-flow-{k}", batch.index) for k in (1, 2)]
        share = noise.uniform("mean-flow-different", batch.index)
        t, other = torch.maximum(*drawn), torch.minimum(*drawn)
        r = torch.where(share < self.settings.different_times, other, t)
        alpha, sigma = process.alpha_sigma(r)
        return t, sigma / (alpha + sigma)
