"""`TeleportScheduler`: a diffusers scheduler whose first steps are one exact map of a Gaussian.

    pipe.scheduler = fastdistill.TeleportScheduler(pipe.scheduler, gaussian, skip=7)

and the pipeline runs as before, without the first seven steps. The pure noise that it starts from
is carried from the level of step 0 to that of step 7 along the Gaussian's probability-flow ODE, in
the scheduler's own variables:

    Euler, Heun, EDM's Euler and DPM-Solver++    x_0 + sigma eps, behind scale_model_input
    DPM-Solver++ multistep, UniPC                alpha x_0 + sigma eps, also with flow sigmas
    DDIM                                         the same, by alphas_cumprod
    flow-match Euler                             (1 - sigma) x_0 + sigma eps

A pipeline hands its samples to a scheduler in ``scale_model_input``, before the network sees them,
and in ``step``. Those for flow matching (SD 3, Flux) have no ``scale_model_input``: their network
sees the start in any case, so that its first evaluation is spent on it and its output dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.gaussian.model import Gaussian, LabelledGaussian


class _Place(NamedTuple):
    """Coefficients of the process at one of a scheduler's steps, in its own variables."""

    alpha: float
    sigma: float


def _variance_exploding(scheduler: Any, index: int) -> _Place:
    return _Place(1.0, float(scheduler.sigmas[index]))


def _by_sigmas(scheduler: Any, index: int) -> _Place:
    sigma = float(scheduler.sigmas[index])
    if scheduler.config.get("use_flow_sigmas", False):
        return _Place(1 - sigma, sigma)
    alpha = (sigma**2 + 1) ** -0.5
    return _Place(alpha, sigma * alpha)


def _by_timesteps(scheduler: Any, index: int) -> _Place:
    bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
    return _Place(bar**0.5, (1 - bar) ** 0.5)


def _flow(scheduler: Any, index: int) -> _Place:
    sigma = float(scheduler.sigmas[index])
    return _Place(1 - sigma, sigma)


_PLACES: dict[str, Callable[[Any, int], _Place]] = {
    "EulerDiscreteScheduler": _variance_exploding,
    "HeunDiscreteScheduler": _variance_exploding,
    "EDMEulerScheduler": _variance_exploding,
    "EDMDPMSolverMultistepScheduler": _variance_exploding,
    "DPMSolverMultistepScheduler": _by_sigmas,
    "UniPCMultistepScheduler": _by_sigmas,
    "DDIMScheduler": _by_timesteps,
    "FlowMatchEulerDiscreteScheduler": _flow,
}
_WITHOUT_SCALING = ("FlowMatchEulerDiscreteScheduler",)


def _signed_as(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` under the name and the signature of another."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


class TeleportScheduler:
    """Wraps a scheduler of diffusers; everything that is not said here is the scheduler's own.

    Use it with a Gaussian of what the network was trained on: pixels in [-1, 1], or latents as they
    come out of `fastdistill encode`. With classifier-free guidance the Gaussian knows of no scale:
    skip what `fastdistill gaussian diagnose` allows.

    Args:
        scheduler: one of those above; its history is empty at the first step, as of any new run.
        gaussian: fitted to the data, or ``mixture.given(labels)`` for samples of known classes.
        skip: steps (not evaluations) that are passed over.
        spend_first: let the network see the untransported start once, and drop what it says; for
            pipelines that have no ``scale_model_input``. By default for flow matching alone.

    Attributes:
        scheduler: the wrapped scheduler; put it back before saving a pipeline.
        timesteps: those of the evaluations that are left.

    Raises:
        ValueError: for a scheduler that is not known, a mixture, and a negative ``skip``;
            by `set_timesteps` where no step is left; by `step` where the network was shown samples
            that were not transported; by `set_begin_index` where a pipeline begins later itself.
    """

    def __init__(
        self,
        scheduler: Any,
        gaussian: Gaussian | LabelledGaussian,
        skip: int,
        spend_first: bool | None = None,
    ) -> None:
        kind = type(scheduler).__name__
        if kind not in _PLACES:
            raise ValueError(
                f"{kind} cannot be teleported; known are {', '.join(_PLACES)}: make one by "
                "NAME.from_config(pipe.scheduler.config)"
            )
        if skip < 0:
            raise ValueError(f"skip is {skip}; expected a number of steps, 0 or more")
        if not isinstance(gaussian, Gaussian | LabelledGaussian):
            raise ValueError(
                f"{type(gaussian).__name__} cannot be teleported: the ODE of a mixture has no "
                "closed form; give one Gaussian, or mixture.given(labels) of one by class"
            )
        self.scheduler, self.gaussian, self.skip = scheduler, gaussian, skip
        self.spend_first = kind in _WITHOUT_SCALING if spend_first is None else spend_first
        self._place = _PLACES[kind]
        self._pending = self._shown = False
        # Pipelines look at the signatures of these.
        self.set_timesteps = _signed_as(scheduler.set_timesteps, self._set_timesteps)
        self.step = _signed_as(scheduler.step, self._step)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not yet there, while it is being copied
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __len__(self) -> int:
        return len(self.scheduler)

    @property
    def timesteps(self) -> Tensor:
        """Timesteps of the evaluations that a pipeline makes."""
        given = self.scheduler.timesteps
        if not self.skip:
            return given
        left = given[self._first :]
        return torch.cat((given[:1], left)) if self.spend_first else left

    @property
    def _first(self) -> int:
        """Place of the first step that is taken among the scheduler's timesteps."""
        return self.skip * self.scheduler.order

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self.scheduler.set_timesteps(*args, **kwargs)
        steps = -(-len(self.scheduler.timesteps) // self.scheduler.order)
        if self.skip >= steps:
            raise ValueError(f"skip is {self.skip}, which leaves none of {steps} steps; skip fewer")
        self.set_begin_index(0)
        self._pending, self._shown = self.skip > 0, False

    def set_begin_index(self, begin_index: int = 0) -> None:
        """What pipelines call before their first step, with 0."""
        if begin_index != 0:
            raise ValueError(
                f"the pipeline begins at step {begin_index} itself, as from a given image: there "
                "is no pure noise to teleport; use its scheduler as it is"
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self._first)

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the network reads; before the first step, of the transported sample."""
        if self._pending and not self.spend_first:
            sample, self._shown = self._transported(sample), True
        scale = getattr(self.scheduler, "scale_model_input", None)
        return sample if scale is None else scale(sample, *args, **kwargs)

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any):
        if not self._pending:
            return self.scheduler.step(model_output, timestep, sample, *args, **kwargs)
        if not self.spend_first and not self._shown:
            raise ValueError(
                "the network was shown samples that were not teleported, since this pipeline does "
                "not call scale_model_input; give TeleportScheduler spend_first=True"
            )
        self._pending = False
        sample = self._transported(sample)
        if not self.spend_first:
            return self.scheduler.step(model_output, timestep, sample, *args, **kwargs)
        if not kwargs.get("return_dict", True):
            return (sample,)
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        return SchedulerOutput(prev_sample=sample)

    def _transported(self, sample: Tensor) -> Tensor:
        """The start, carried to the level of the first step that is taken."""
        self.gaussian = self.gaussian.to(sample.device)
        start, end = self._place(self.scheduler, 0), self._place(self.scheduler, self._first)
        return self.gaussian.transport(sample, *start, *end)
