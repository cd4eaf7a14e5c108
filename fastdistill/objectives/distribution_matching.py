"""`DistributionMatching`: Diff-Instruct, DMD2 and f-distill are settings of this one objective.

The student x = G(z) receives, at a noise level t of a law and x_t = alpha x + sigma eps,

    g = h(r) (D_psi(x_t) - D_phi(x_t)) / (mean |x - D_phi| + 1e-6)

with D_phi the guided teacher, D_psi the critic, which is trained by denoising score matching on
the student's samples, and r = p_t / q_t from a discriminator on features at the same x_t.

    Diff-Instruct   reverse_kl, normalise=False, no discriminator       arXiv 2305.18455
    DMD2            reverse_kl, discriminator with gan_weight > 0       arXiv 2405.14867
    f-distill       any divergence; all but reverse_kl need the discriminator   arXiv 2502.15681
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdistill.diffusion import Noise, Parametrisation, TimestepLaw
from fastdistill.models import Denoiser, Level
from fastdistill.models.denoiser import concatenate_conditions
from fastdistill.objectives.base import Batch, Objective, Update
from fastdistill.objectives.denoising import (
    denoising_pair,
    denoising_update,
    noised_for,
)
from fastdistill.objectives.discriminator import Discriminator, logistic_cotangent
from fastdistill.objectives.divergences import Divergence, get_divergence
from fastdistill.objectives.stand_in import Split, StandIn, take_rows
from fastdistill.ops import density_ratio_weight, log_snr_bin, matching_cotangent, renoise


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
    share_critic_forward: bool = False
    """On the student's turn let the critic's forward at the student's (x_t, t), drawn from
    ``matching_law``, serve its own update too: a forward less, and one of its updates a cycle is
    at that law's times instead of ``critic_law``'s."""
    share_feature_forward: bool = False
    """Let the pass of the critic's own loss also yield the features of the generated samples, so
    that the discriminator is trained at ``critic_law``'s times instead of ``matching_law``'s."""

    def __post_init__(self) -> None:
        check_sharing(self)

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


class DistributionMatching(Objective):
    """One- or few-step distillation by pathwise score differences.

    Args:
        student: generator, a denoiser called at ``student_times``.
        teacher: frozen denoiser of the data distribution.
        critic: denoiser of the student's distribution, usually a copy of the teacher.
        student_times: the student's times from the noisiest on, in the process' clock; one makes a
            one-step generator, more are trained by backward simulation (DMD2).
        matching_law: law of the times at which scores are compared.
        critic_law: law of the critic's training times.
        critic_loss_space: space of the critic's squared error; its own parametrisation if None.
        discriminator: needed for a GAN term and for every divergence but reverse KL.
        settings: numbers of the method.
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
        stand_in: StandIn | None = None,
    ) -> None:
        super().__init__()
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
        if critic.process != teacher.process or student.process != teacher.process:
            raise ValueError("student, teacher and critic must share one forward process")
        reads_teacher = discriminator is not None and settings.gan_features == "teacher"
        if stand_in is not None and reads_teacher:
            raise ValueError(
                "stand_in leaves the teacher out at high noise, but the discriminator reads the "
                "teacher's features there; set gan_features: critic, or drop stand_in"
            )
        if not student_times:
            raise ValueError("student_times is empty; expected at least one time")
        self.student, self.critic = student, critic
        self.discriminator = discriminator
        self.student_times = list(student_times)
        self.matching_law, self.critic_law = matching_law, critic_law
        self.critic_loss_space = critic_loss_space or critic.parametrisation
        self.settings = settings
        self.stand_in = stand_in
        self._frozen = (teacher.requires_grad_(False).eval(),)  # a tuple: not a registered module
        self.ratio_history: Tensor
        if settings.divergence.needs_ratio:
            self.register_buffer("ratio_history", torch.zeros(self.noise_bins, 2))

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher."""
        return self._frozen[0]

    def critic_modules(self) -> dict[str, nn.Module]:
        roles: dict[str, nn.Module] = {"critic": self.critic}
        if self.discriminator is not None:
            roles["discriminator"] = self.discriminator
        return roles

    def networks(self) -> dict[str, Denoiser]:
        return {**super().networks(), "teacher": self.teacher}

    def frozen_roles(self) -> list[str]:
        if self.settings.gan_weight == 0:
            return []  # no gradient passes through a critic
        reads_critic = self.settings.gan_features == "critic"
        return ["discriminator", *(["critic"] if reads_critic else [])]

    def course(self, noise: Noise) -> int:
        """How many of the student's times come before the one that is trained."""
        steps = len(self.student_times)
        return noise.choice("backward-simulation", steps) if steps > 1 else 0

    def generate(self, batch: Batch) -> Tensor:
        """The student's sample; with several times, at a step drawn for the whole batch.

        Backward simulation: the earlier steps run as at inference, without a graph, so that the
        student is trained on the inputs that it will see. The one critic follows the mixture of all
        steps' samples, so that it is their mixture that is matched to the teacher.
        """
        process = self.student.process
        t = torch.full(batch.index.shape, self.student_times[0], device=batch.index.device)
        x_t = self.student.first_input(batch.noise.normal("latents", batch.index, batch.shape), t)
        for k in range(1, self.course(batch.noise) + 1):
            with torch.no_grad():
                x0 = self.student(x_t, t, batch.condition)
            t = torch.full_like(t, self.student_times[k])
            x_t = renoise(
                x0, *process.alpha_sigma(t), batch.noise.key(f"renoise-{k}"), batch.index
            ).x_t
        return self.student(x_t, t, batch.condition)

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        settings = self.settings
        # Only the GAN term looks at x_t as a function of the sample; the rest is a constant to it.
        source = sample if settings.gan_weight > 0 else sample.detach()
        split = None if self.stand_in is None else self.stand_in.split(batch)
        noised = noised_for(self.teacher, batch, source, split or self.matching_law, "matching")
        level = noised.level
        critic_level, critic_input = self._critic_view(level, noised.x_t, noised.model_input)
        raw_teacher, raw_uncond, raw_critic, logits = self._evaluate(
            {"teacher": level, "critic": critic_level},
            {"teacher": noised.model_input, "critic": critic_input},
            batch,
            None if split is None else (split, noised.x_t.detach()),
        )
        shared = None
        if settings.share_critic_forward:
            shared = raw_critic, noised.x_t.detach(), critic_level
            raw_critic = raw_critic.detach()
        bins = self._bins(level)
        weight, metrics = self._weight(logits, bins, batch)
        if split is not None:
            weight = split.weight if weight is None else weight * split.weight
            metrics["teacher_share"] = split.teacher_share
        matched = matching_cotangent(
            sample.detach(),
            noised.x_t.detach(),
            raw_teacher,
            level.coefficients,
            raw_critic,
            critic_level.coefficients,
            teacher_uncond=raw_uncond,
            guidance_scale=settings.guidance_scale,
            weight=weight,
            normalise=settings.normalise,
            scale=batch.scale,
        )
        pairs = [(sample, matched.cotangent)]
        if settings.gan_weight > 0:
            assert logits is not None
            gan = logistic_cotangent(logits, real=True, scale=settings.gan_weight * batch.scale)
            pairs.append((logits, gan.cotangent))
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
        return Update(pairs, metrics, bins, tuple(by_level), shared)

    def critic_update(self, batch: Batch, sample: Tensor, shared: Any = None) -> Update:
        if self.settings.share_feature_forward:
            return self._critic_and_discriminator_update(batch, sample)
        if shared is None:
            pair, loss, _ = denoising_update(
                self.critic, batch, sample, self.critic_law, self.critic_loss_space, "critic"
            )
        else:
            raw, x_t, level = shared
            pair, loss = denoising_pair(
                raw, sample, x_t, level, self.critic_loss_space, batch.scale
            )
        update = Update([pair], {"loss": loss})
        return update if self.discriminator is None else self._discriminate(batch, sample, update)

    def _critic_and_discriminator_update(self, batch: Batch, sample: Tensor) -> Update:
        """Both losses at one (x_t, t): the critic's pass on x_t yields the fakes' features too.

        The real samples get the same level and noise, so that the logit sees only what tells the
        two apart.
        """
        assert batch.real is not None
        critic = self.critic
        noised = noised_for(critic, batch, sample, self.critic_law, "critic")
        real = noised_for(critic, batch, batch.real, self.critic_law, "critic")
        level = noised.level
        raw, fake_features = critic.network.forward_with_features(
            noised.model_input, level.noise_condition, batch.condition, output_graph=True
        )
        real_features = critic.network.features(
            real.model_input, level.noise_condition, batch.condition
        )
        pair, loss = denoising_pair(
            raw, sample, noised.x_t, level, self.critic_loss_space, batch.scale
        )
        features = [torch.cat(both) for both in zip(fake_features, real_features, strict=True)]
        update = Update([pair], {"loss": loss})
        return self._discriminated(features, self._bins(level), batch, update)

    def _evaluate(
        self,
        levels: dict[str, Level],
        inputs: dict[str, Tensor],
        batch: Batch,
        split: tuple[Split, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Raw outputs of teacher (with and without the condition) and critic, and the logits.

        With a split of the rows (and x_t), the stand-in answers for some of the teacher's. The pass
        that yields the discriminator's features also yields its network's raw output, and
        keeps a graph up to the features only where the GAN term needs one.
        """
        settings, source = self.settings, self.settings.gan_features
        networks = {"teacher": self.teacher.network, "critic": self.critic.network}
        raw: dict[str, Tensor] = {}
        logits = None
        if self.discriminator is not None:
            with torch.set_grad_enabled(settings.gan_weight > 0):
                raw[source], features = networks[source].forward_with_features(
                    inputs[source], levels[source].noise_condition, batch.condition
                )
                logits = self.discriminator(features)
        uncond = None
        with torch.no_grad():
            if split is not None:
                raw["teacher"], uncond = self._with_stand_in(
                    *split, levels["teacher"], inputs["teacher"], batch
                )
            elif settings.guidance_scale != 1.0:
                raw["teacher"], uncond = self._guided(
                    levels["teacher"], inputs["teacher"], batch, raw.get("teacher")
                )
        for role, network in networks.items():
            if role not in raw:
                graded = role == "critic" and settings.share_critic_forward
                level, model_input = levels[role], inputs[role].detach()
                with torch.set_grad_enabled(graded):
                    raw[role] = network(model_input, level.noise_condition, batch.condition)
        return raw["teacher"], uncond, raw["critic"], logits

    def _with_stand_in(
        self, split: Split, x_t: Tensor, level: Level, model_input: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """Teacher with and without the condition, the stand-in answering for its own rows."""
        assert self.stand_in is not None
        rows, uncond = split.teacher, None
        condition, uncondition = take_rows((batch.condition, batch.uncondition), rows)
        own_level, own_input = take_rows(level, rows), model_input.detach()[rows]
        if self.settings.guidance_scale != 1.0:
            own = dataclasses.replace(batch, condition=condition, uncondition=uncondition)
            raw, other = self._guided(own_level, own_input, own, None)
            uncond = self.stand_in.fill(other, split, x_t, level, batch.uncondition)
        else:
            raw = self.teacher.network(own_input, own_level.noise_condition, condition)
        return self.stand_in.fill(raw, split, x_t, level, batch.condition), uncond

    def _guided(
        self, level: Level, model_input: Tensor, batch: Batch, conditional: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Teacher with and without the condition, in one forward where both are still to do."""
        network = self.teacher.network
        if conditional is not None:
            return conditional, network(model_input, level.noise_condition, batch.uncondition)
        both = network(
            torch.cat((model_input, model_input)),
            torch.cat((level.noise_condition, level.noise_condition)),
            concatenate_conditions(batch.condition, batch.uncondition),
        )
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    def _critic_view(self, level: Level, x_t: Tensor, model_input: Tensor) -> tuple[Level, Tensor]:
        """The critic's level and network input: the teacher's where they are of one kind."""
        critic, teacher = self.critic, self.teacher
        if critic.parametrisation == teacher.parametrisation:
            if critic.input_dtype == teacher.input_dtype:
                return level, model_input
        else:
            level = critic.level(level.t)
        if level.input_scale is not None:
            x_t = level.input_scale.reshape(-1, *[1] * (x_t.ndim - 1)) * x_t
        return level, x_t.to(critic.input_dtype or x_t.dtype)

    def _bins(self, level: Level) -> Tensor:
        return log_snr_bin(level.alpha, level.sigma, self.noise_bins, *self.log_snr_range)

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

    def _discriminated(
        self, features: list[Tensor], bins: Tensor, batch: Batch, update: Update
    ) -> Update:
        """Add the discriminator's loss on the features of B generated and B real samples."""
        assert self.discriminator is not None
        settings = self.settings
        logits = self.discriminator(features)
        fake_logits, real_logits = logits.chunk(2)
        scale = settings.gan_critic_weight * batch.scale
        fake = logistic_cotangent(fake_logits, real=False, scale=scale)
        real = logistic_cotangent(real_logits, real=True, scale=scale)
        correct = (fake_logits.mean(1) < 0).float() + (real_logits.mean(1) > 0).float()
        metrics = update.metrics | {
            "discriminator_loss": fake.loss + real.loss,
            "discriminator_accuracy": correct / 2,
        }
        pair = (logits, torch.cat((fake.cotangent, real.cotangent)))
        by_level = ("discriminator_accuracy",)
        return Update([*update.pairs, pair], metrics, bins, by_level)
