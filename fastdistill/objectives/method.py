"""`Method`: the section ``objective`` of a recipe, which makes an objective out of networks."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from fastdistill.choices import RewardChoice, Settings
from fastdistill.models import Denoiser
from fastdistill.objectives.base import Objective
from fastdistill.objectives.discriminator import Discriminator
from fastdistill.objectives.reward import Reward

if TYPE_CHECKING:
    from fastdistill.config import TrainingSettings


class Networks(Protocol):
    """What an objective may be made of; the engine makes no network that is not asked for."""

    @property
    def student(self) -> Denoiser:
        """The trained generator, as it starts."""

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher."""

    @property
    def training(self) -> TrainingSettings:
        """How it will be trained, for methods whose numbers follow a schedule."""

    def critic(self) -> Denoiser:
        """A trained copy of the teacher, or low-rank weights upon it; asked for once."""

    def discriminator(self) -> Discriminator:
        """A discriminator on features of the teacher's shapes."""

    def reward(self, choice: RewardChoice) -> Reward:
        """The reward that a recipe names."""


class Method(Settings, abc.ABC):
    """A distillation method: its numbers, and how its objective is made.

    A subclass gives ``name`` as a ``Literal``, documents each of its keys, and stands in
    `fastdistill.objectives.METHODS`.
    """

    name: str
    """The method."""
    student_times: tuple[float, ...] = Field(min_length=1)
    """The student's times from the noisiest on, in the process' clock; one for one step."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the teacher."""

    @property
    def needs_real(self) -> bool:
        """Whether the method learns from real samples."""
        return False

    @property
    def needs_null(self) -> bool:
        """Whether the method reads the null condition."""
        return self.guidance_scale != 1.0

    @property
    def trains(self) -> tuple[str, ...]:
        """Roles besides the student that are trained: each needs an optimizer."""
        return ("critic",)

    @abc.abstractmethod
    def build(self, networks: Networks) -> Objective:
        """The objective, with the networks that it needs."""
