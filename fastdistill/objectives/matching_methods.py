"""`DistributionMatching` in recipes, and the published methods that are settings of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from fastdistill.choices import LawChoice, RewardChoice
from fastdistill.objectives.distribution_matching import (
    DistributionMatching,
    MatchingSettings,
    check_entropy,
    check_sharing,
)
from fastdistill.objectives.divergences import get_divergence
from fastdistill.objectives.method import Networks
from fastdistill.objectives.score_method import ScoreMethod
from fastdistill.objectives.stand_in import StandInSettings


class DistributionMatchingMethod(ScoreMethod):
    """Any pathwise method: divergence, normaliser, GAN and what they share."""

    name: Literal["distribution_matching"] = "distribution_matching"
    """distribution_matching: Diff-Instruct, DMD2, f-distill and all between them."""
    divergence: str = "reverse_kl"
    """Any name of the f-table, as reverse_kl, jensen_shannon, forward_kl, squared_hellinger."""
    normalise: bool = True
    """Divide the score gap by DMD's mean |x - D_teacher|; false gives Diff-Instruct."""
    matching_law: LawChoice
    """Law of the times at which scores are compared."""
    critic_law: LawChoice
    """Law of the critic's training times."""
    gan_weight: float = Field(default=0.0, ge=0)
    """Weight of the GAN term in the student's loss (mean-reduction convention)."""
    gan_features: Literal["teacher", "critic"] = "teacher"
    """Whose features the discriminator reads."""
    gan_critic_weight: PositiveFloat = 1.0
    """Weight of the discriminator's loss beside the critic's."""
    ratio_decay: float = Field(default=0.9, ge=0, le=1)
    """Decay, a student update, of the density ratio's history in each noise-level bin."""
    ratio_prior: float = Field(default=1.0, ge=0)
    """Pseudo-samples of ratio one in each bin."""
    logit_clamp: PositiveFloat = 10.0
    """Bound of the discriminator's logit in the density ratio."""
    ratio_min: float = Field(default=0.1, ge=0)
    """Lower bound of the density ratio before it is calibrated."""
    ratio_max: PositiveFloat = 20.0
    """Upper bound of the density ratio before it is calibrated."""
    stand_in: StandInSettings | None = None
    """A fitted Gaussian in the teacher's place above a noise level (docs/gaussian.md); null asks
    the teacher always."""
    share_critic_forward: bool = False
    """Let the critic's forward in the student's update serve one of its own updates, which then is
    at matching_law's times."""
    share_feature_forward: bool = False
    """Let the pass of the critic's loss yield the discriminator's features of generated samples,
    which then is trained at critic_law's times."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """ESD's lambda: the critic is read as lambda D(x_t, no condition) + (1 - lambda) D(x_t,
    condition), for samples that differ between conditions; 0 reads it with the condition alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> DistributionMatchingMethod:
        get_divergence(self.divergence)
        check_sharing(self)
        check_entropy(self)
        return self

    @property
    def needs_discriminator(self) -> bool:
        """Whether the method reads a discriminator."""
        return self.gan_weight > 0 or get_divergence(self.divergence).needs_ratio

    def matching_settings(self) -> MatchingSettings:
        """The numbers that the objective reads."""
        names = {field.name for field in dataclasses.fields(MatchingSettings)}
        chosen = {name: getattr(self, name) for name in names}
        return MatchingSettings(**chosen | {"divergence": get_divergence(self.divergence)})

    def parts(self, networks: Networks) -> dict[str, Any]:
        """The arguments of the objective."""
        teacher, stand_in = networks.teacher, self.stand_in
        return {
            "student": networks.student,
            "teacher": teacher,
            "critic": networks.critic(),
            "student_times": self.student_times,
            "matching_law": self.matching_law,
            "critic_law": self.critic_law,
            "discriminator": networks.discriminator() if self.needs_discriminator else None,
            "settings": self.matching_settings(),
            "reward": None if self.reward is None else networks.reward(self.reward),
            "stand_in": None if stand_in is None else stand_in.load(teacher, self.matching_law),
        }

    def build(self, networks: Networks) -> DistributionMatching:
        return DistributionMatching(**self.parts(networks))


class DiffInstruct(DistributionMatchingMethod):
    """Diff-Instruct (arXiv 2305.18455): reverse KL without a normaliser."""

    name: Literal["diff_instruct"]  # type: ignore[assignment]
    """diff_instruct: reverse KL without a normaliser."""
    normalise: bool = False
    """Divide the score gap by DMD's mean |x - D_teacher|, which Diff-Instruct does not."""


class DiffInstructPlusPlus(DiffInstruct):
    """Diff-Instruct++ (arXiv 2410.18881): Diff-Instruct with a reward."""

    name: Literal["diff_instruct_plus_plus"]  # type: ignore[assignment]
    """diff_instruct_plus_plus: reverse KL without a normaliser, with a reward."""
    reward: RewardChoice
    """What samples are wanted to be like."""
    reward_weight: PositiveFloat
    """Weight of the reward in the student's loss (mean-reduction convention)."""


class ESD(DistributionMatchingMethod):
    """Entropic Score Distillation (arXiv 2401.00909), with the lambda that its authors suggest."""

    name: Literal["esd"]  # type: ignore[assignment]
    """esd: reverse KL with an entropy of the samples of all conditions together."""
    normalise: bool = False
    """Divide the score gap by DMD's mean |x - D_teacher|, which ESD does not."""
    entropy_weight: float = Field(default=0.5, ge=0)
    """ESD's lambda: the critic is read as lambda D(x_t, no condition) + (1 - lambda) D(x_t,
    condition), for samples that differ between conditions; 0 reads it with the condition alone."""
    critic_condition_dropout: float = Field(default=0.5, ge=0, lt=1)
    """Share of the critic's training samples that are shown the null condition."""


class DMD(DistributionMatchingMethod):
    """DMD2 without its GAN, which needs no real samples."""

    name: Literal["dmd"]  # type: ignore[assignment]
    """dmd: reverse KL with DMD's normaliser; DMD2 without its GAN."""


class DMD2(DistributionMatchingMethod):
    """DMD2 (arXiv 2405.14867), with the GAN weights of its SD 1.5."""

    name: Literal["dmd2"]  # type: ignore[assignment]
    """dmd2: reverse KL with DMD's normaliser and a GAN on the critic's features."""
    gan_weight: float = Field(default=1e-3, ge=0)
    """Weight of the GAN term in the student's loss (mean-reduction convention)."""
    gan_features: Literal["teacher", "critic"] = "critic"
    """Whose features the discriminator reads."""
    gan_critic_weight: PositiveFloat = 1e-2
    """Weight of the discriminator's loss beside the critic's."""


class FDistill(DistributionMatchingMethod):
    """f-distill (arXiv 2502.15681), with its default divergence."""

    name: Literal["f_distill"]  # type: ignore[assignment]
    """f_distill: Jensen-Shannon, or another divergence, with a GAN on the teacher's features."""
    divergence: str = "jensen_shannon"
    """Any name of the f-table, as reverse_kl, jensen_shannon, forward_kl, squared_hellinger."""
    gan_weight: float = Field(default=1e-3, ge=0)
    """Weight of the GAN term in the student's loss (mean-reduction convention)."""
