"""`ScoreMethod`: what recipes say of every method that compares a teacher with a critic."""

from __future__ import annotations

import abc

from pydantic import Field, model_validator

from fastdistill.choices import RewardChoice, check_reward
from fastdistill.objectives.augmentation import AugmentationSettings
from fastdistill.objectives.method import Method


class ScoreMethod(Method):
    """The keys that pathwise and projection methods share (`ScoreDistillation`)."""

    critic_condition_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the critic's training samples that are shown the null condition."""
    critic_augmentation: AugmentationSettings | None = None
    """ScoreAug in the critic's loss; null trains it on plain samples."""
    reward: RewardChoice | None = None
    """What samples are wanted to be like; null is no reward."""
    reward_weight: float = Field(default=0.0, ge=0)
    """Weight of the reward in the student's loss (mean-reduction convention)."""

    @model_validator(mode="after")
    def _reward_has_a_weight(self) -> ScoreMethod:
        check_reward(self.reward, self.reward_weight)
        return self

    @property
    @abc.abstractmethod
    def needs_discriminator(self) -> bool:
        """Whether the method reads a discriminator."""

    @property
    def needs_null(self) -> bool:
        return super().needs_null or self.critic_condition_dropout > 0

    @property
    def needs_real(self) -> bool:
        return self.needs_discriminator

    @property
    def trains(self) -> tuple[str, ...]:
        return ("critic", "discriminator") if self.needs_discriminator else ("critic",)
