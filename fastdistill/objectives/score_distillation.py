"""`ScoreDistillation`: what every method of a frozen teacher and a trained critic shares.

The student's samples are noised to a level of ``matching_law``, where teacher and critic, the
denoiser of the student's own distribution, are compared; how, is the method's. The critic follows
the student by denoising its samples. A discriminator on a network's features and a reward of the
clean samples may add terms of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdistill.diffusion import Noise, Parametrisation, TimestepLaw
from fastdistill.models import Denoiser, Level
from fastdistill.models.denoiser import concatenate_conditions
from fastdistill.objectives.augmentation import AugmentationSettings
from fastdistill.objectives.base import Batch, Objective, Update
from fastdistill.objectives.denoising import (
    denoising_pair,
    denoising_update,
    drop_conditions,
    noised_for,
)
from fastdistill.objectives.discriminator import Discriminator, logistic_cotangent
from fastdistill.objectives.reward import Reward, reward_cotangent
from fastdistill.ops import log_snr_bin, renoise


def draw_course(noise: Noise, times: Sequence[float]) -> int:
    """How many of a student's times come before the one that this step's samples are of."""
    return noise.choice("backward-simulation", len(times)) if len(times) > 1 else 0


def backward_simulation(
    student: Denoiser, times: Sequence[float], course: int, batch: Batch
) -> Tensor:
    """A student's samples at the time after ``course`` earlier ones  # [B, ...]

    The earlier steps run as at inference, without a graph, so that the student is trained on the
    inputs that it will see (DMD2, arXiv 2405.14867).
    """
    process = student.process
    t = torch.full(batch.index.shape, times[0], device=batch.index.device)
    x_t = student.first_input(batch.noise.normal("latents", batch.index, batch.shape), t)
    for k in range(1, course + 1):
        with torch.no_grad():
            x0 = student(x_t, t, batch.condition)
        t = torch.full_like(t, times[k])
        x_t = renoise(x0, *process.alpha_sigma(t), batch.noise.key(f"renoise-{k}"), batch.index).x_t
    return student(x_t, t, batch.condition)


class ScoreSettings(Protocol):
    """Numbers that all these methods have."""

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance of the teacher."""

    @property
    def gan_weight(self) -> float:
        """Weight of softplus(-logit) in the student's loss, in the mean-reduction convention."""

    @property
    def gan_critic_weight(self) -> float:
        """Weight of the discriminator's loss in the critic's update."""

    @property
    def reward_weight(self) -> float:
        """Weight of minus the reward in the student's loss, in the mean-reduction convention."""

    @property
    def critic_condition_dropout(self) -> float:
        """Share of the critic's training samples that are shown the null condition."""

    @property
    def critic_augmentation(self) -> AugmentationSettings | None:
        """ScoreAug's transformations in the critic's loss."""

    @property
    def needs_discriminator(self) -> bool:
        """Whether the method reads a discriminator."""


class ScoreDistillation(Objective):
    """One- or few-step distillation by comparing a teacher's and a critic's denoisers.

    Args:
        student: generator, a denoiser called at ``student_times``.
        teacher: frozen denoiser of the data distribution.
        critic: denoiser of the student's distribution, usually a copy of the teacher.
        student_times: the student's times from the noisiest on, in the process' clock; one makes a
            one-step generator, more are trained by backward simulation (DMD2).
        matching_law: law of the times at which teacher and critic are compared.
        critic_law: law of the critic's training times.
        settings: numbers of the method.
        critic_loss_space: space of the critic's squared error; its ``loss_space`` if None.
        discriminator: where ``settings`` need one.
        reward: of clean samples, where ``settings.reward_weight`` is not 0.

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
        settings: ScoreSettings,
        critic_loss_space: Parametrisation | None = None,
        discriminator: Discriminator | None = None,
        reward: Reward | None = None,
    ) -> None:
        super().__init__()
        if critic.process != teacher.process or student.process != teacher.process:
            raise ValueError("student, teacher and critic must share one forward process")
        if not student_times:
            raise ValueError("student_times is empty; expected at least one time")
        if (reward is not None) != (settings.reward_weight != 0):
            given = "a reward" if reward is not None else "no reward"
            raise ValueError(
                f"reward_weight is {settings.reward_weight:g} with {given}; give both or neither"
            )
        if settings.critic_augmentation is not None:
            settings.critic_augmentation.check(critic.network, "critic")
        self.student, self.critic = student, critic
        self.discriminator = discriminator
        self.student_times = list(student_times)
        self.matching_law, self.critic_law = matching_law, critic_law
        self.critic_loss_space = critic_loss_space or critic.loss_space
        self.settings: Any = settings
        # Tuples: what is frozen is not registered, and so no state of a run.
        self._frozen = (teacher.requires_grad_(False).eval(),)
        self._reward = (reward,)

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

    def course(self, noise: Noise) -> int:
        """How many of the student's times come before the one that is trained."""
        return draw_course(noise, self.student_times)

    def generate(self, batch: Batch) -> Tensor:
        """The student's sample; with several times, at a step drawn for the whole batch.

        The one critic follows the mixture of all steps' samples, so that it is their mixture that
        is matched to the teacher.
        """
        course = self.course(batch.noise)
        return backward_simulation(self.student, self.student_times, course, batch)

    def critic_update(self, batch: Batch, sample: Tensor, shared: Any = None) -> Update:
        """The critic's denoising loss on the samples."""
        batch = self._critics_view(batch)
        pair, loss, _ = denoising_update(
            *(self.critic, batch, sample, self.critic_law, self.critic_loss_space, "critic"),
            self.settings.critic_augmentation,
        )
        return Update([pair], {"loss": loss})

    def _critics_view(self, batch: Batch) -> Batch:
        """The batch with some conditions dropped, so that the critic learns the null one too."""
        rate = self.settings.critic_condition_dropout
        if rate == 0:
            return batch
        condition = drop_conditions(batch, rate, "critic-condition-dropout")
        return dataclasses.replace(batch, condition=condition)

    def _critic_and_discriminator_update(self, batch: Batch, sample: Tensor) -> Update:
        """Both losses at one (x_t, t): the critic's pass on x_t yields the fakes' features too.

        The real samples get the same level and noise, so that the logit sees only what tells the
        two apart.
        """
        batch, critic = self._critics_view(batch), self.critic
        assert batch.real is not None
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

    def _with_and_without(
        self,
        denoiser: Denoiser,
        level: Level,
        model_input: Tensor,
        batch: Batch,
        conditional: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Raw outputs with and without the condition, in one forward where both are to be made."""
        network = denoiser.network
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

    def _rewarded(self, batch: Batch, sample: Tensor, update: Update) -> Update:
        """Add the reward's term to a student's update, where there is one."""
        (reward,) = self._reward
        if reward is None:
            return update
        scale = self.settings.reward_weight * batch.scale
        found = reward_cotangent(reward, sample, batch.condition, scale)
        return dataclasses.replace(
            update,
            pairs=[*update.pairs, (sample, found.cotangent)],
            metrics=update.metrics | {"reward": found.reward},
        )
