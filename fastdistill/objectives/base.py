"""What the trainer and an objective say to each other."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.diffusion import Noise
from fastdistill.models import Condition, Denoiser


@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch of an update: this rank's share of it, where there are several."""

    index: Tensor
    """Global index of each sample within this update, int64 [B]: what noise is drawn by."""
    noise: Noise
    """Source of randomness, at this update's step."""
    scale: float
    """Factor that makes per-sample losses the update's mean: 1 / (B * micro-batches), since
    gradients are averaged over ranks."""
    shape: tuple[int, ...]
    """Shape of one sample."""
    real: Tensor | None = None
    """Real samples [B, ...], for objectives that use data."""
    condition: Condition = None
    """What each sample is conditioned on."""
    uncondition: Condition = None
    """The empty or negative condition of classifier-free guidance."""
    gather: Callable[[Tensor], Tensor] = lambda value: value
    """Joins a tensor [B, ...] of every rank in the order of samples, for statistics over all."""
    share: slice = dataclasses.field(default_factory=lambda: slice(None))
    """This rank's samples among those that ``gather`` joins."""


@dataclasses.dataclass(frozen=True)
class Update:
    """What one micro-batch sends into the networks, and what it has to report."""

    pairs: list[tuple[Tensor, Tensor]]
    """(tensor, cotangent) pairs for torch.autograd.backward."""
    metrics: dict[str, Tensor]
    """Values for the log, on the device: scalars, or one a sample [B]."""
    noise_bin: Tensor | None = None
    """Noise-level bin of each sample, for metrics that are also reported by level  # [B]"""
    by_level: tuple[str, ...] = ()
    """Names of the metrics reported by noise level."""
    shared: Any = None
    """In a student's update: a pass of the critic that its own update of this step can use."""

    def backward(self) -> None:
        """Accumulate gradients into every parameter that the graphs reach."""
        tensors, cotangents = zip(*self.pairs, strict=True)
        torch.autograd.backward(tensors, cotangents)


class Objective(nn.Module, abc.ABC):
    """A distillation method: what is generated, and the cotangents of each update.

    An objective is a module so that its networks and its small state (as the history of density
    ratios) are saved by name. The frozen teacher is not registered: it is no state of a run.
    Subclasses implement `generate`, `student_update` and, with a critic, `critic_modules` and
    `critic_update`; the trainer owns everything else.
    """

    student: Denoiser
    noise_bins: int = 10
    """Number of log-SNR bins that metrics by noise level are reported in."""
    log_snr_range: tuple[float, float] = (-10.0, 10.0)
    """Lower edge of the first and upper edge of the last bin."""

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained; without, every update is the student's."""
        return bool(self.critic_modules())

    def critic_modules(self) -> dict[str, nn.Module]:
        """Networks that `critic_update` trains, by role; none in a method without a critic."""
        return {}

    def networks(self) -> dict[str, Denoiser]:
        """Every denoiser that a step runs, by role, frozen ones too."""
        roles: dict[str, Any] = {"student": self.student, **self.critic_modules()}
        return {role: module for role, module in roles.items() if isinstance(module, Denoiser)}

    def frozen_roles(self) -> list[str]:
        """Critic modules that the student's gradient passes through: their weights stay out of it.

        All by default; fewer save the host's time, as each is told tensor by tensor.
        """
        return list(self.critic_modules())

    def graded(self) -> list[Denoiser]:
        """Denoisers whose passes keep a graph, be it for their weights or only for their input."""
        trained = (self.student, *self.critic_modules().values())
        return [module for module in trained if isinstance(module, Denoiser)]

    def before_step(self, step: int) -> None:
        """Host work before a step, as moving a schedule or replacing frozen weights in place.

        Called once a step and first after a resume, so that it may depend on the step alone.
        """

    def course(self, noise: Noise) -> Hashable:
        """What the host decides about the course of `generate`, by the seed and the step alone.

        Steps of one course launch the same kernels, so that one CUDA graph holds them.
        """
        return None

    @abc.abstractmethod
    def generate(self, batch: Batch) -> Tensor:
        """Samples of the student, with a graph where gradients are enabled  # [B, ...]"""

    @abc.abstractmethod
    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        """Cotangents of the student's update from its samples (with a graph)."""

    def critic_update(self, batch: Batch, sample: Tensor, shared: Any = None) -> Update:
        """Cotangents of the critic's update (and the discriminator's) from detached samples.

        Args:
            batch: what the samples were generated for.
            sample: the student's samples, detached  # [B, ...]
            shared: what the student's update of this step left for it in ``Update.shared``.
        """
        raise TypeError(f"{type(self).__name__} names critic_modules but has no critic_update")
