"""`DistributionMatching`: Diff-Instruct, DMD2 and f-distill are settings of this one objective.

The student x = G(z) receives, at a noise level t of a law and x_t = alpha x + sigma eps,

    g = h(r) (D_psi(x_t) - D_phi(x_t)) / (mean |x - D_phi| + 1e-6)

with D_phi the guided teacher, D_psi the critic, which is trained by denoising score matching on
the student's samples, and r = p_t / q_t from a discriminator on features at the same x_t.

    Diff-Instruct   reverse_kl, normalise=False, no discriminator       arXiv 2305.18455
    DMD2            reverse_kl, discriminator with gan_weight > 0       arXiv 2405.14867
    f-distill       any divergence; all but reverse_kl need the discriminator   arXiv 2502.15681
    Diff-Instruct++ Diff-Instruct with a reward of the samples  arXiv 2410.18881
    ESD             entropy_weight lambda > 0 reads the critic as lambda D_psi(x_t, no condition)
                    + (1 - lambda) D_psi(x_t, condition)        arXiv 2401.00909
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastdistill.diffusion import Parametrisation, TimestepLaw
from fastdistill.models import Denoiser, Level
from fastdistill.models.denoiser import concatenate_conditions
from fastdistill.objectives.augmentation import AugmentationSettings
from fastdistill.objectives.base import Batch, Update
from fastdistill.objectives.denoising import denoising_pair, noised_for
from fastdistill.objectives.discriminator import Discriminator, logistic_cotangent
from fastdistill.objectives.divergences import Divergence, get_divergence
from fastdistill.objectives.reward import Reward
from fastdistill.objectives.score_distillation import ScoreDistillation
from fastdistill.objectives.stand_in import Split, StandIn, take_rows
from fastdistill.ops import density_ratio_weight, matching_cotangent, renoise


@dataclasses.dataclass(frozen=True)
class MatchingSettings:
    """Numbers of the method; the defaults are DMD2's without its GAN."""

    divergence: Divergence = dataclasses.field(default_factory=lambda: get_divergence("reverse_kl"))
    normalise: bool = True
    """Divide by DMD's mean |x - D_phi|."""
    guidance_scale: float = 1.0
    gan_weight: float = 0.0
    """Weight of softplus(-logit) in the student's loss, in the mean-reduction convention."""
    gan_features: Literal["teacher", "critic"] = "teacher"
    """Whose features the discriminator reads; DMD2 uses (and trains) the critic's."""
    gan_critic_weight: float = 1.0
    """Weight of the discriminator's loss in the critic's update (DMD2: 0.01)."""
    ratio_decay: float = 0.9
    ratio_prior: float = 1.0
    logit_clamp: float = 10.0
    ratio_min: float = 0.1
    ratio_max: float = 20.0
    critic_augmentation: AugmentationSettings | None = None
    """ScoreAug's transformations in the critic's loss."""
    share_critic_forward: bool = False
    """On the student's turn let the critic's forward at the student's (x_t, t), drawn from
    ``matching_law``, serve its own update too: a forward less, and one of its updates a cycle is
    at that law's times instead of ``critic_law``'s."""
    share_feature_forward: bool = False
    """Let the pass of the critic's own loss also yield the features of the generated samples, so
    that the discriminator is trained at ``critic_law``'s times instead of ``matching_law``'s."""
    entropy_weight: float = 0.0
    """ESD's lambda: weight of the entropy of the samples of all conditions together."""
    critic_condition_dropout: float = 0.0
    """Share of the critic's training samples that are shown the null condition."""
    reward_weight: float = 0.0
    """Weight of minus the reward in the student's loss, in the mean-reduction convention."""

    def __post_init__(self) -> None:
        check_sharing(self)
        check_entropy(self)

    @property
    def needs_discriminator(self) -> bool:
        """Whether the method reads a discriminator."""
        return self.gan_weight > 0 or self.divergence.needs_ratio


def check_sharing(settings: Any) -> None:
    """Raise ValueError for shared forwards that the other settings leave nothing to share for."""
    reads_critic = settings.needs_discriminator and settings.gan_features == "critic"
    if settings.share_feature_forward and not reads_critic:
        raise ValueError(
            "share_feature_forward is for a discriminator that reads the critic's features; set "
            "gan_features: critic (and a gan_weight, or a divergence that reads the density "
            "ratio), or turn it off"
        )
    if settings.share_critic_forward and reads_critic:
        raise ValueError(
            "share_critic_forward is not for gan_features: critic, where the student's gradient "
            "passes through the critic with frozen weights; set gan_features: teacher, or turn it "
            "off"
        )
    if settings.share_critic_forward and settings.critic_condition_dropout > 0:
        raise ValueError(
            "share_critic_forward is not for critic_condition_dropout, since the pass that is "
            "shared has every condition; turn one of them off"
        )
    shares = settings.share_critic_forward or settings.share_feature_forward
    if settings.critic_augmentation is not None and shares:
        raise ValueError(
            "critic_augmentation transforms what the critic reads, so that its pass cannot be "
            "shared with one that asks for plain samples; turn share_critic_forward and "
            "share_feature_forward off"
        )


def check_entropy(settings: Any) -> None:
    """Raise ValueError for ESD with a critic that is not trained to go without a condition."""
    if settings.entropy_weight != 0 and settings.critic_condition_dropout == 0:
        raise ValueError(
            f"entropy_weight is {settings.entropy_weight:g}, for which the critic must know the "
            "null condition: set critic_condition_dropout, as 0.5"
        )


class _Outputs(NamedTuple):
    """What the networks say at x_t."""

    teacher: Tensor
    teacher_uncond: Tensor | None
    critic: Tensor
    critic_uncond: Tensor | None
    logits: Tensor | None


class DistributionMatching(ScoreDistillation):
    """One- or few-step distillation by pathwise score differences.

    Args:
        student: see `ScoreDistillation`, as of all but ``settings``.
        teacher: see there.
        critic: see there.
        student_times: see there.
        matching_law: see there.
        critic_law: see there.
        critic_loss_space: see there.
        discriminator: needed for a GAN term and for every divergence but reverse KL.
        settings: numbers of the method.
        reward: see there.
        stand_in: answers for the teacher above a noise level; nobody does if None.

    Raises:
        ValueError: for settings that do not fit together.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        critic: Denoiser,
        student_times: Sequence[float],
        matching_law: TimestepLaw,
        critic_law: TimestepLaw,
        critic_loss_space: Parametrisation | None = None,
        discriminator: Discriminator | None = None,
        settings: MatchingSettings | None = None,
        reward: Reward | None = None,
        stand_in: StandIn | None = None,
    ) -> None:
        settings = settings or MatchingSettings()
        if settings.needs_discriminator and discriminator is None:
            raise ValueError(
                f"divergence {settings.divergence.name} with gan_weight {settings.gan_weight} "
                "needs a discriminator"
            )
        if not settings.needs_discriminator and discriminator is not None:
            raise ValueError(
                "a discriminator is given, but reverse_kl with gan_weight 0 uses none; drop it, "
                "or choose another divergence or a GAN weight"
            )
        reads_teacher = discriminator is not None and settings.gan_features == "teacher"
        if stand_in is not None and reads_teacher:
            raise ValueError(
                "stand_in leaves the teacher out at high noise, but the discriminator reads the "
                "teacher's features there; set gan_features: critic, or drop stand_in"
            )
        super().__init__(
            student,
            teacher,
            critic,
            student_times,
            matching_law,
            critic_law,
            settings,
            critic_loss_space,
            discriminator,
            reward,
        )
        self.stand_in = stand_in
        self.ratio_history: Tensor
        if settings.divergence.needs_ratio:
            self.register_buffer("ratio_history", torch.zeros(self.noise_bins, 2))

    def frozen_roles(self) -> list[str]:
        if self.settings.gan_weight == 0:
            return []  # no gradient passes through a critic
        reads_critic = self.settings.gan_features == "critic"
        return ["discriminator", *(["critic"] if reads_critic else [])]

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        settings = self.settings
        # Only the GAN term looks at x_t as a function of the sample; the rest is a constant to it.
        source = sample if settings.gan_weight > 0 else sample.detach()
        split = None if self.stand_in is None else self.stand_in.split(batch)
        noised = noised_for(self.teacher, batch, source, split or self.matching_law, "matching")
        level = noised.level
        critic_level, critic_input = self._critic_view(level, noised.x_t, noised.model_input)
        raw = self._evaluate(
            {"teacher": level, "critic": critic_level},
            {"teacher": noised.model_input, "critic": critic_input},
            batch,
            None if split is None else (split, noised.x_t.detach()),
        )
        shared = None
        if settings.share_critic_forward:
            shared = raw.critic, noised.x_t.detach(), critic_level
        bins = self._bins(level)
        weight, metrics = self._weight(raw.logits, bins, batch)
        if split is not None:
            weight = split.weight if weight is None else weight * split.weight
            metrics["teacher_share"] = split.teacher_share
        matched = matching_cotangent(
            sample.detach(),
            noised.x_t.detach(),
            raw.teacher,
            level.coefficients,
            raw.critic.detach(),
            critic_level.coefficients,
            teacher_uncond=raw.teacher_uncond,
            guidance_scale=settings.guidance_scale,
            critic_uncond=raw.critic_uncond,
            esd_lambda=settings.entropy_weight,
            weight=weight,
            normalise=settings.normalise,
            scale=batch.scale,
        )
        pairs = [(sample, matched.cotangent)]
        if settings.gan_weight > 0:
            assert raw.logits is not None
            gan = logistic_cotangent(raw.logits, real=True, scale=settings.gan_weight * batch.scale)
            pairs.append((raw.logits, gan.cotangent))
            metrics["gan_loss"] = gan.loss
        metrics |= {
            "loss": matched.loss,
            "residual": matched.residual,
            "score_gap": matched.squared_gap,
            "nonfinite": matched.nonfinite,
        }
        by_level = ["score_gap", "residual"]
        if "ratio" in metrics:
            by_level.append("ratio")
        update = Update(pairs, metrics, bins, tuple(by_level), shared)
        return self._rewarded(batch, sample, update)

    def critic_update(self, batch: Batch, sample: Tensor, shared: Any = None) -> Update:
        if self.settings.share_feature_forward:
            return self._critic_and_discriminator_update(batch, sample)
        if shared is None:
            update = super().critic_update(batch, sample)
        else:
            raw, x_t, level = shared
            pair, loss = denoising_pair(
                raw, sample, x_t, level, self.critic_loss_space, batch.scale
            )
            update = Update([pair], {"loss": loss})
        return update if self.discriminator is None else self._discriminate(batch, sample, update)

    def _evaluate(
        self,
        levels: dict[str, Level],
        inputs: dict[str, Tensor],
        batch: Batch,
        split: tuple[Split, Tensor] | None = None,
    ) -> _Outputs:
        """Raw outputs of teacher and critic, as far as they are read, and the logits.

        With a split of the rows (and x_t) the stand-in answers for some of the teacher's.
        The pass that yields the discriminator's features also yields its network's raw output, and
        keeps a graph up to the features only where the GAN term needs one.
        """
        settings, source = self.settings, self.settings.gan_features
        denoisers = {"teacher": self.teacher, "critic": self.critic}
        raw: dict[str, Tensor] = {}
        logits = None
        if self.discriminator is not None:
            with torch.set_grad_enabled(settings.gan_weight > 0):
                raw[source], features = denoisers[source].network.forward_with_features(
                    inputs[source], levels[source].noise_condition, batch.condition
                )
                logits = self.discriminator(features)
        both_of = {
            "teacher": settings.guidance_scale != 1.0,
            "critic": settings.entropy_weight != 0.0,
        }
        uncond: dict[str, Tensor] = {}
        for role, denoiser in denoisers.items():
            level, model_input = levels[role], inputs[role].detach()
            if role == "teacher" and split is not None:
                with torch.no_grad():
                    raw[role], other = self._with_stand_in(*split, level, model_input, batch)
                if other is not None:
                    uncond[role] = other
            elif both_of[role]:
                with torch.no_grad():
                    raw[role], uncond[role] = self._with_and_without(
                        denoiser, level, model_input, batch, raw.get(role)
                    )
            elif role not in raw:
                graded = role == "critic" and settings.share_critic_forward
                with torch.set_grad_enabled(graded):
                    raw[role] = denoiser.network(
                        model_input, level.noise_condition, batch.condition
                    )
        return _Outputs(
            raw["teacher"], uncond.get("teacher"), raw["critic"], uncond.get("critic"), logits
        )

    def _with_stand_in(
        self, split: Split, x_t: Tensor, level: Level, model_input: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """Teacher with and without the condition, the stand-in answering for its own rows."""
        assert self.stand_in is not None
        rows, fill = split.teacher, self.stand_in.fill
        own_level, own_input = take_rows(level, rows), model_input[rows]
        condition, uncondition = take_rows((batch.condition, batch.uncondition), rows)
        if self.settings.guidance_scale == 1.0:
            raw = self.teacher.network(own_input, own_level.noise_condition, condition)
            return fill(raw, split, x_t, level, batch.condition), None
        own = dataclasses.replace(batch, condition=condition, uncondition=uncondition)
        raw, other = self._with_and_without(self.teacher, own_level, own_input, own)
        return (
            fill(raw, split, x_t, level, batch.condition),
            fill(other, split, x_t, level, batch.uncondition),
        )

    def _weight(
        self, logits: Tensor | None, bins: Tensor, batch: Batch
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """h(r) of each sample, normalised over all ranks' samples, and what there is to report."""
        divergence, settings = self.settings.divergence, self.settings
        if not divergence.needs_ratio:
            return None, {}
        assert logits is not None
        result = density_ratio_weight(
            batch.gather(logits.detach()),
            batch.gather(bins),
            self.ratio_history,
            power=divergence.power,
            c0=divergence.c0,
            c1=divergence.c1,
            exponent=divergence.exponent,
            decay=settings.ratio_decay,
            prior=settings.ratio_prior,
            logit_clamp=settings.logit_clamp,
            ratio_min=settings.ratio_min,
            ratio_max=settings.ratio_max,
        )
        self.ratio_history.copy_(result.history)
        # Kish's effective sample size of weights with mean one, as a share of the batch.
        effective = 1 / result.weight.square().mean()
        metrics = {"ratio": result.ratio[batch.share], "effective_sample_size": effective}
        return result.weight[batch.share], metrics

    def _discriminate(self, batch: Batch, sample: Tensor, update: Update) -> Update:
        """Add the discriminator's loss on real and generated samples, in one pass of 2 B."""
        assert batch.real is not None
        settings = self.settings
        owner = self.teacher if settings.gan_features == "teacher" else self.critic
        t = self.matching_law.sample(owner.process, batch.noise, "discriminator-t", batch.index)
        level = owner.level(torch.cat((t, t)))
        # Both halves share noise and level, so that the logit sees only what tells them apart.
        noised = renoise(
            torch.cat((sample, batch.real)),
            level.alpha,
            level.sigma,
            batch.noise.key("discriminator-noise"),
            torch.cat((batch.index, batch.index)),
            level.input_scale,
            owner.input_dtype,
        )
        condition = concatenate_conditions(batch.condition, batch.condition)
        with torch.set_grad_enabled(settings.gan_features == "critic"):
            features = owner.network.features(noised.model_input, level.noise_condition, condition)
        return self._discriminated(features, self._bins(level)[: len(t)], batch, update)
