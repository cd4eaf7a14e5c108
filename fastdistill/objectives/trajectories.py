"""What objectives along the trajectories of the probability-flow ODE share.

They start from noised data and either follow the teacher's ODE from there (distillation), or the
straight path back to the clean sample, which has its velocity on average (training).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from fastdistill.choices import Settings
from fastdistill.diffusion.clocks import Clock
from fastdistill.models import Condition, Denoiser
from fastdistill.objectives.base import Batch, Objective

Derivative = Literal["forward_mode", "finite_differences"]


class TrajectorySettings(Settings):
    """Whose trajectories are followed."""

    source: Literal["data", "teacher"] = "teacher"
    """teacher: distillation along the guided teacher's ODE. data: training without one."""

    @property
    def needs_real(self) -> bool:
        """Whether the method learns from real samples: trajectories begin at noised ones."""
        return True

    @property
    def trains(self) -> tuple[str, ...]:
        """Roles besides the student that are trained."""
        return ()

    @model_validator(mode="after")
    def _guides_a_teacher(self) -> TrajectorySettings:
        scale = getattr(self, "guidance_scale", 1.0)
        if self.source == "data" and scale != 1:
            raise ValueError(
                f"guidance_scale is {scale}, but source data follows no teacher that could be "
                "guided; set source: teacher, or guidance_scale: 1"
            )
        return self


class DerivativeSettings(Settings):
    """How a derivative along a trajectory is found."""

    derivative: Derivative = "forward_mode"
    """forward_mode: torch.func.jvp, exact, where every layer has one and weights are not sharded in
    mode fsdp. finite_differences: two more forwards of any network in float32."""
    derivative_step: PositiveFloat = Field(default=0.01, lt=1)
    """Change of ln(sigma / alpha) to either side, for finite differences."""


class TrajectoryObjective(Objective):
    """A student that learns on noised data; no critic.

    Args:
        student: the denoiser that is trained.
        teacher: the frozen denoiser whose ODE is followed; not called where ``source`` is data.
        source: whose trajectories are followed.
        guidance_scale: classifier-free guidance of the teacher.

    Raises:
        ValueError: where the two have other processes.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        source: Literal["data", "teacher"],
        guidance_scale: float,
    ) -> None:
        super().__init__()
        if student.process != teacher.process:
            raise ValueError("student and teacher must share one forward process")
        self.student = student
        self.source, self.guidance_scale = source, guidance_scale
        self._frozen = (teacher.requires_grad_(False).eval(),)  # a tuple: not a registered module

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher."""
        return self._frozen[0]

    def networks(self) -> dict[str, Denoiser]:
        frozen = {"teacher": self.teacher} if self.source == "teacher" else {}
        return {**super().networks(), **frozen}

    def generate(self, batch: Batch) -> Tensor:
        """The real samples; the student's pass is part of the update."""
        assert batch.real is not None
        return batch.real

    @torch.no_grad()
    def teach(self, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        """The guided teacher's D(x_t, t)  # [B, ...]"""
        return self.teacher.guided(x_t, t, batch.condition, batch.uncondition, self.guidance_scale)

    def end(self, batch: Batch, sample: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Where the trajectory's tangent at x_t leads: the clean sample, or the teacher's D."""
        return sample if self.source == "data" else self.teach(batch, x_t, t)


def check_derivative(derivative: Derivative, precision: str) -> None:
    """Raise ValueError for finite differences of networks whose rounding would drown them."""
    if derivative == "finite_differences" and precision == "bfloat16":
        raise ValueError(
            "objective.derivative is finite_differences, but networks in bfloat16 round away what "
            "differs; set training.precision: float32, or derivative: forward_mode"
        )


def wide(number: Tensor, like: Tensor) -> Tensor:
    """A number a sample [B], shaped to broadcast against ``like`` [B, ...]."""
    return number.reshape(-1, *[1] * (like.ndim - 1))


def velocity(
    denoiser: Denoiser,
    clock: Clock,
    y: Tensor,
    log_ratio: Tensor,
    condition: Condition,
    until: Tensor | None = None,
) -> Tensor:
    """V(y, ln lambda) = (skip y - D) / out in a clock's variables (`diffusion.clocks`).

    Args:
        denoiser: the denoiser D.
        clock: whose y it is.
        y: points of the curve [B, ...].
        log_ratio: ln(sigma / alpha) of each sample [B].
        condition: what the denoiser is conditioned on.
        until: flow time to which a denoiser of two times leads [B].
    """
    ratio = log_ratio.exp()
    t = denoiser.process.time_of_ratio(ratio)
    moment = clock.at(ratio)
    x_t = wide(denoiser.process.alpha_sigma(t).alpha / moment.scale, y) * y
    denoised = denoiser(x_t, t, condition, until)
    return (wide(moment.skip, y) * y - denoised) / wide(moment.out, y)


@torch.no_grad()
def velocity_derivative(
    denoiser: Denoiser,
    clock: Clock,
    y: Tensor,
    log_ratio: Tensor,
    slope: Tensor,
    condition: Condition,
    until: Tensor | None = None,
    *,
    derivative: Derivative = "forward_mode",
    step: float = 0.01,
) -> Tensor:
    """dV / d ln lambda where y moves by ``slope`` for each unit of ln lambda  # [B, ...]

    Args:
        denoiser: the denoiser behind V.
        clock: whose y it is.
        y: points of the curve [B, ...].
        log_ratio: ln(sigma / alpha) of each sample [B].
        slope: dy / d ln lambda [B, ...].
        condition: what the denoiser is conditioned on.
        until: flow time to which a denoiser of two times leads [B].
        derivative: how it is found; see `DerivativeSettings`.
        step: change of ln lambda to either side, for finite differences, whose error is its square
            and the networks' rounding error over it.

    Raises:
        ValueError: for forward mode where a layer of the network has none.
    """

    def at(y: Tensor, log_ratio: Tensor) -> Tensor:
        return velocity(denoiser, clock, y, log_ratio, condition, until)

    if derivative == "finite_differences":
        ahead = at(y + step * slope, log_ratio + step)
        return (ahead - at(y - step * slope, log_ratio - step)) / (2 * step)
    try:
        tangents = (slope, torch.ones_like(log_ratio))
        return torch.func.jvp(at, (y, log_ratio), tangents)[1]
    except RuntimeError as error:  # NotImplementedError is one
        if "forward" not in str(error) and "jvp" not in str(error):
            raise
        raise ValueError(
            f"a layer of {type(denoiser.network).__name__} has no forward-mode derivative "
            f"({str(error).splitlines()[0]}); set objective.derivative: finite_differences"
        ) from error
