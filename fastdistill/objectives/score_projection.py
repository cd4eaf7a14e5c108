"""`ScoreProjection`: SIM, SiD, SiDA and Diff-Instruct* are settings of this one objective.

At a noise level t of a law and x_t = alpha x + sigma eps, with D_phi the guided teacher, D_psi the
critic and E = D_phi(x_t) - D_psi(x_t), the student x = G(z) descends

    projection_weight / N * < d'(E), D_phi(x_t) - x - alpha E > / n

where N is the number of elements of a sample and n = 1 or, with ``normalise``, mean |x - D_phi|.
The weights of teacher and critic are frozen, but their input is not: the gradient passes through
both networks into x_t, and from there to the sample, besides the sample's own.

    SIM              any distance d, alpha = 1                           arXiv 2410.16794
    SiD              squared L2, alpha 1 to 1.2, weight 1/2, normalised  arXiv 2404.04057
    SiDA             SiD with a GAN term on the critic's features        arXiv 2410.14919
    Diff-Instruct*   SIM with a reward of the samples                    arXiv 2410.20898

Distances are of denoisers. Those of scores, (alpha / sigma^2) E, are the same at each level up to a
weight of the level, with c sigma^2 / alpha in the place of pseudo-Huber's c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdistill.diffusion import Parametrisation, TimestepLaw
from fastdistill.models import Denoiser, Level
from fastdistill.objectives.base import Batch, Update
from fastdistill.objectives.denoising import Noised, noised_for
from fastdistill.objectives.discriminator import Discriminator, logistic_cotangent
from fastdistill.objectives.distances import get_distance
from fastdistill.objectives.reward import Reward
from fastdistill.objectives.score_distillation import ScoreDistillation, ScoreSettings
from fastdistill.ops import matching_cotangent, projection_cotangents
from fastdistill.ops.projection import NORMALISER_FLOOR


class ProjectionSettings(ScoreSettings, Protocol):
    """Numbers of the method (`fastdistill.objectives.ScoreProjectionMethod`)."""

    @property
    def distance(self) -> str:
        """Name of d, as `get_distance` takes it."""

    @property
    def alpha(self) -> float:
        """SiD's alpha: 1/2 is half the gradient of Fisher's divergence, 1 half of SIM's."""

    @property
    def projection_weight(self) -> float:
        """Factor of the loss."""

    @property
    def normalise(self) -> bool:
        """Whether projection and GAN term are divided by mean |x - D_phi|."""

    @property
    def guidance(self) -> str:
        """inside: of the teacher in E; outside: a term of its own (Diff-Instruct*)."""


class _Outputs(NamedTuple):
    """What the networks say at x_t, with graphs."""

    teacher: Tensor
    teacher_uncond: Tensor | None
    critic: Tensor
    logits: Tensor | None


class ScoreProjection(ScoreDistillation):
    """One- or few-step distillation by projecting a distance of denoisers through both networks.

    An update of the student costs two backward passes to the input, the teacher's and the
    critic's, beside its own: about twice that of `DistributionMatching`.

    Args:
        student: see `ScoreDistillation`, as of all but ``settings``.
        teacher: see there.
        critic: see there.
        student_times: see there.
        matching_law: see there.
        critic_law: see there.
        settings: numbers of the method.
        critic_loss_space: see there.
        discriminator: needed for a GAN term; it reads the critic's features.
        reward: see there.

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
        settings: ProjectionSettings,
        critic_loss_space: Parametrisation | None = None,
        discriminator: Discriminator | None = None,
        reward: Reward | None = None,
    ) -> None:
        if settings.needs_discriminator != (discriminator is not None):
            given = "without" if discriminator is None else "with"
            raise ValueError(
                f"gan_weight is {settings.gan_weight:g} {given} a discriminator; a GAN term needs "
                "one, and nothing else does"
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

    def graded(self) -> list[Denoiser]:
        return [*super().graded(), self.teacher]

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        settings, elements = self.settings, sample[0].numel()
        noised = noised_for(self.teacher, batch, sample, self.matching_law, "matching")
        level, x_t = noised.level, noised.x_t
        critic_level, critic_input = self._critic_view(level, x_t, noised.model_input)
        raw = self._evaluate(noised, critic_level, critic_input, batch)
        inside = raw.teacher_uncond is not None
        found = projection_cotangents(
            sample.detach(),
            x_t.detach(),
            raw.teacher.detach(),
            level.coefficients,
            raw.critic.detach(),
            critic_level.coefficients,
            distance=get_distance(settings.distance, elements),
            alpha=settings.alpha,
            teacher_uncond=None if raw.teacher_uncond is None else raw.teacher_uncond.detach(),
            guidance_scale=settings.guidance_scale if inside else 1.0,
            normalise=settings.normalise,
            scale=settings.projection_weight * batch.scale / elements,
        )
        pairs = [
            (sample, found.x0),
            (x_t, found.x_t),
            (raw.teacher, found.teacher),
            (raw.critic, found.critic),
        ]
        if raw.teacher_uncond is not None:
            assert found.teacher_uncond is not None
            pairs.append((raw.teacher_uncond, found.teacher_uncond))
        elif settings.guidance_scale != 1.0:
            pairs.append((x_t, self._outer_guidance(noised, raw.teacher, sample, batch)))
        metrics = {
            "loss": found.loss * (settings.projection_weight / elements),
            "residual": found.residual,
            "score_gap": found.squared_gap,
            "dropped": found.dropped,
        }
        if raw.logits is not None:
            weight = settings.gan_weight * batch.scale
            gan = logistic_cotangent(raw.logits, real=True, scale=weight)
            cotangent = gan.cotangent
            if settings.normalise:
                cotangent = cotangent / found.residual.clamp(min=NORMALISER_FLOOR)[:, None]
            pairs.append((raw.logits, cotangent.to(raw.logits.dtype)))
            metrics["gan_loss"] = gan.loss
        update = Update(pairs, metrics, self._bins(level), ("score_gap", "residual"))
        return self._rewarded(batch, sample, update)

    def critic_update(self, batch: Batch, sample: Tensor, shared: Any = None) -> Update:
        """The critic's denoising loss and, in the same pass, the discriminator's (SiDA)."""
        if self.discriminator is None:
            return super().critic_update(batch, sample)
        return self._critic_and_discriminator_update(batch, sample)

    def _evaluate(
        self, noised: Noised, critic_level: Level, critic_input: Tensor, batch: Batch
    ) -> _Outputs:
        """Raw outputs of teacher and critic with graphs to x_t, and the discriminator's logits."""
        settings, level = self.settings, noised.level
        uncond = None
        if settings.guidance_scale != 1.0 and settings.guidance == "inside":
            teacher, uncond = self._with_and_without(self.teacher, level, noised.model_input, batch)
        else:
            teacher = self.teacher.network(
                noised.model_input, level.noise_condition, batch.condition
            )
        network = self.critic.network
        seen = critic_input, critic_level.noise_condition, batch.condition
        if self.discriminator is None:
            return _Outputs(teacher, uncond, network(*seen), None)
        critic, features = network.forward_with_features(*seen, output_graph=True)
        return _Outputs(teacher, uncond, critic, self.discriminator(features))

    def _outer_guidance(
        self, noised: Noised, conditional: Tensor, sample: Tensor, batch: Batch
    ) -> Tensor:
        """Cotangent of x_t that raises log p_t(condition | x_t), as guidance outside of E does.

        It is -(guidance_scale - 1) (D_phi(x_t, condition) - D_phi(x_t, none)), with the weight of
        the loss: the implicit reward of guidance, whose gradient takes no path through the teacher.
        """
        settings, level = self.settings, noised.level
        with torch.no_grad():
            unconditional = self.teacher.network(
                noised.model_input, level.noise_condition, batch.uncondition
            )
        return matching_cotangent(
            sample.detach(),
            noised.x_t.detach(),
            conditional.detach(),
            level.coefficients,
            unconditional,
            level.coefficients,
            normalise=settings.normalise,
            scale=(settings.guidance_scale - 1) * settings.projection_weight * batch.scale,
            dtype=noised.x_t.dtype,
        ).cotangent
