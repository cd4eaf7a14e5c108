"""`ScoreProjection` in recipes, and the published methods that are settings of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from fastdistill.choices import LawChoice, RewardChoice
from fastdistill.diffusion import KarrasIndex, LogNormalSigma
from fastdistill.objectives.distances import get_distance
from fastdistill.objectives.method import Networks
from fastdistill.objectives.score_method import ScoreMethod
from fastdistill.objectives.score_projection import ScoreProjection


class ScoreProjectionMethod(ScoreMethod):
    """Any score-projection method: distance, alpha, normaliser, GAN term and reward."""

    name: Literal["score_projection"]
    """score_projection: SIM, SiD, SiDA, Diff-Instruct* and all between them."""
    distance: str = "squared_l2"
    """Distance of whole samples: squared_l2, l1, power:A, pseudo_huber:C, or pseudo_huber with
    C = 0.00054 sqrt(elements of a sample)."""
    alpha: float = 1.0
    """SiD's alpha: 1/2 is half the gradient of Fisher's divergence, 1 half of SIM's."""
    projection_weight: PositiveFloat = 1.0
    """Factor of the projection beside GAN term and reward; SiD's is 1/2."""
    normalise: bool = False
    """Divide projection and GAN term by each sample's mean |x - D_teacher|, as SiD does."""
    guidance: Literal["inside", "outside"] = "inside"
    """Where guidance acts: inside the distance, or outside as a term of its own with weight
    guidance_scale - 1 (Diff-Instruct*)."""
    matching_law: LawChoice = KarrasIndex(first=0, last=799)
    """Law of the times at which teacher and critic are compared; SiD's by default."""
    critic_law: LawChoice = LogNormalSigma(-1.2, 1.2)
    """Law of the critic's training times; EDM's by default."""
    gan_weight: float = Field(default=0.0, ge=0)
    """Weight of the GAN term in the student's loss (mean-reduction convention)."""
    gan_critic_weight: PositiveFloat = 1e-2
    """Weight of the discriminator's loss beside the critic's."""

    @model_validator(mode="after")
    def _fits_together(self) -> ScoreProjectionMethod:
        get_distance(self.distance)
        if self.critic_augmentation is not None and self.needs_discriminator:
            raise ValueError(
                "critic_augmentation transforms what the critic reads, so that its pass cannot "
                "yield the discriminator's features; turn it off, or set gan_weight to 0"
            )
        return self

    @property
    def needs_discriminator(self) -> bool:
        """Whether the method reads a discriminator."""
        return self.gan_weight > 0

    def build(self, networks: Networks) -> ScoreProjection:
        return ScoreProjection(
            networks.student,
            networks.teacher,
            networks.critic(),
            self.student_times,
            self.matching_law,
            self.critic_law,
            self,
            discriminator=networks.discriminator() if self.needs_discriminator else None,
            reward=None if self.reward is None else networks.reward(self.reward),
        )


class SIM(ScoreProjectionMethod):
    """Score Implicit Matching (arXiv 2410.16794) with its pseudo-Huber distance."""

    name: Literal["sim"]  # type: ignore[assignment]
    """sim: Score Implicit Matching."""
    distance: str = "pseudo_huber"
    """Distance of whole samples: squared_l2, l1, power:A, pseudo_huber:C, or pseudo_huber with
    C = 0.00054 sqrt(elements of a sample)."""


class SiD(ScoreProjectionMethod):
    """Score identity Distillation (arXiv 2404.04057), with its alpha of CIFAR-10."""

    name: Literal["sid"]  # type: ignore[assignment]
    """sid: Score identity Distillation."""
    alpha: float = 1.2
    """SiD's alpha: 1/2 is half the gradient of Fisher's divergence, 1 half of SIM's."""
    projection_weight: PositiveFloat = 0.5
    """Factor of the projection beside GAN term and reward; SiD's is 1/2."""
    normalise: bool = True
    """Divide projection and GAN term by each sample's mean |x - D_teacher|, as SiD does."""


class SiDA(SiD):
    """SiD with the critic's encoder as a discriminator (arXiv 2410.14919)."""

    name: Literal["sida"]  # type: ignore[assignment]
    """sida: Score identity Distillation with a GAN term on the critic's features."""
    alpha: float = 1.0
    """SiD's alpha: 1/2 is half the gradient of Fisher's divergence, 1 half of SIM's."""
    gan_weight: float = Field(default=1e-4, ge=0)
    """Weight of the GAN term in the student's loss (mean-reduction convention): the published 0.01
    beside a projection of weight 100, of sums over pixels."""


class DiffInstructStar(ScoreProjectionMethod):
    """Diff-Instruct* (arXiv 2410.20898): SIM's pseudo-Huber distance and a reward."""

    name: Literal["diff_instruct_star"]  # type: ignore[assignment]
    """diff_instruct_star: Score Implicit Matching with a reward."""
    distance: str = "pseudo_huber"
    """Distance of whole samples: squared_l2, l1, power:A, pseudo_huber:C, or pseudo_huber with
    C = 0.00054 sqrt(elements of a sample)."""
    reward: RewardChoice
    """What samples are wanted to be like."""
    reward_weight: PositiveFloat
    """Weight of the reward in the student's loss (mean-reduction convention)."""
