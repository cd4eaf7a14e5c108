"""`Consistency`: consistency training and distillation in discrete steps, iCT and ECT.

With f the consistency function, which leads a sample of any noise level to the start of its
trajectory, and levels lambda_r < lambda_t of a law of pairs (`diffusion.timestep_pairs`),

    loss = 1 / (lambda_t - lambda_r) (sqrt(||f(x_t, t) - sg f(x_r, r)||^2 + c^2) - c)

over the whole sample, c = huber sqrt(elements) (iCT, arXiv 2310.14189; ECT, arXiv 2406.14548). The
target is made by the same weights, without a graph.

    source data      x_t, x_r = alpha x_0 + sigma eps at either level, with the same x_0 and eps
    source teacher   x_r is a Heun step of the guided teacher's ODE from x_t (arXiv 2303.01469)

**Boundary.** f is a step of DDIM with the student's own denoiser D, from lambda to the law's lowest
level lambda_0 (iCT's sigma_min; ECT's 0, where f is D):

    f(x_t, t) = (lambda_0 / lambda) x_t / alpha + (1 - lambda_0 / lambda) D(x_t, t)

so that f(x, lambda_0) = x / alpha holds for every process and parametrisation, and a student that
starts as the teacher's copy stays a denoiser: it is sampled and exported as any other. On EDM's
preconditioning this is iCT's c_out to the letter, and its c_skip to within 0.002 where
lambda > 2 lambda_0. Where r is clean (ECT) the target is the clean sample.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdistill.choices import PairLawChoice
from fastdistill.diffusion import EasyPairs, reach_of
from fastdistill.models import Denoiser, Level
from fastdistill.objectives.base import Batch, Update
from fastdistill.objectives.denoising import noised_at
from fastdistill.objectives.method import Method, Networks
from fastdistill.objectives.trajectories import TrajectoryObjective, TrajectorySettings, wide
from fastdistill.ops import Coefficients, Distance, consistency_cotangent, log_snr_bin


class ConsistencyMethod(TrajectorySettings, Method):
    """Consistency models in discrete steps (arXiv 2310.14189, 2406.14548)."""

    name: Literal["consistency"]
    """consistency: iCT's or ECT's consistency training or distillation, in discrete steps."""
    pairs: PairLawChoice = EasyPairs()
    """Law of the pairs of noise levels: ict (a Karras grid that doubles) or ect (continuous)."""
    huber: float = Field(default=0.00054, ge=0)
    """c / sqrt(elements) of the pseudo-Huber distance; 0 is the plain norm."""

    def build(self, networks: Networks) -> Consistency:
        return Consistency(networks.student, networks.teacher, self, networks.training.steps)


class Consistency(TrajectoryObjective):
    """A consistency function in discrete steps.

    Args:
        student: the denoiser that becomes a consistency function.
        teacher: frozen denoiser, whose ODE is followed where ``settings.source`` is teacher.
        settings: numbers of the method.
        steps: steps of the training, which the law of pairs moves with.

    Raises:
        ValueError: where the student's first time has more noise than the law of pairs reaches.
    """

    def __init__(
        self, student: Denoiser, teacher: Denoiser, settings: ConsistencyMethod, steps: int
    ) -> None:
        super().__init__(student, teacher, settings.source, settings.guidance_scale)
        self.settings, self.steps = settings, steps
        self.reach = reach_of(student.process)
        self.lowest = settings.pairs.lowest(self.reach)
        self._check_start()
        self.progress: Tensor
        device = next(student.parameters()).device
        self.register_buffer("progress", torch.zeros((), device=device), persistent=False)
        self.before_step(0)

    def before_step(self, step: int) -> None:
        self.progress.fill_(self.settings.pairs.progress(step, self.steps))

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        student, settings = self.student, self.settings
        above, below = settings.pairs.sample(
            self.reach, batch.noise, "consistency-t", batch.index, self.progress
        )
        level = student.level(student.process.time_of_ratio(above))
        noised = noised_at(student, level, batch, sample, "consistency")
        raw = student.network(noised.model_input, level.noise_condition, batch.condition)
        with torch.no_grad():
            x_r, level_r = self._earlier(batch, sample, noised.x_t, level, above, below)
            raw_r = self._raw(batch, x_r, level_r)
        cotangent, loss = consistency_cotangent(
            raw.detach(),
            noised.x_t,
            self._bounded(level, above),
            raw_r,
            distance=Distance.pseudo_huber(settings.huber * math.sqrt(sample[0].numel())),
            target_x=x_r,
            target_coefficients=self._bounded(level_r, below),
            weight=1 / (above - below),
            scale=batch.scale,
        )
        bins = log_snr_bin(level.alpha, level.sigma, self.noise_bins, *self.log_snr_range)
        return Update([(raw, cotangent)], {"loss": loss}, bins, ("loss",))

    def _earlier(
        self,
        batch: Batch,
        sample: Tensor,
        x_t: Tensor,
        level: Level,
        above: Tensor,
        below: Tensor,
    ) -> tuple[Tensor, Level]:
        """x_r on the trajectory, and its level, which is the process' lowest where r is 0."""
        process = self.student.process
        level_r = self.student.level(process.time_of_ratio(below.clamp(min=self.reach.low)))
        if self.source == "data":
            still = level_r._replace(sigma=torch.where(below > 0, level_r.sigma, 0))
            return noised_at(self.student, still, batch, sample, "consistency").x_t, level_r
        x, alpha_r = x_t / wide(level.alpha, x_t), wide(level_r.alpha, x_t)
        high, low = wide(above, x_t), wide(below, x_t)
        slope = (x - self.teach(batch, x_t, level.t)) / high
        euler = x + (low - high) * slope
        end = self.teach(batch, (alpha_r * euler).to(x_t.dtype), level_r.t)
        heun = 0.5 * (slope + (euler - end) / low.clamp(min=self.reach.low))
        x_r = x + (low - high) * torch.where(low > 0, heun, slope)
        return (alpha_r * x_r).to(x_t.dtype), level_r

    def _raw(self, batch: Batch, x_t: Tensor, level: Level) -> Tensor:
        """The student's raw output at a level."""
        scaled = x_t if level.input_scale is None else wide(level.input_scale, x_t) * x_t
        model_input = scaled.to(self.student.input_dtype or x_t.dtype)
        return self.student.network(model_input, level.noise_condition, batch.condition)

    def _bounded(self, level: Level, ratio: Tensor) -> Coefficients:
        """(a, b) of f, which is x / alpha at the lowest level and at 0."""
        share = torch.where(ratio > 0, (self.lowest / ratio).clamp(max=1), 1)
        a, b = level.coefficients
        return Coefficients(share / level.alpha + (1 - share) * a, (1 - share) * b)

    def _check_start(self) -> None:
        process = self.student.process
        first = torch.tensor(self.settings.student_times[0], device="cpu")
        alpha, sigma = process.alpha_sigma(first)
        highest = getattr(self.settings.pairs, "sigma_max", math.inf)
        if sigma / alpha > highest * 1.001:
            latest = process.time_of_ratio(torch.tensor(highest, device="cpu"))
            raise ValueError(
                f"student_times begins at {first:g}, where sigma / alpha is {sigma / alpha:g}, but "
                f"pairs reach {highest:g}: begin at {latest:g} or below, or raise pairs.sigma_max"
            )
