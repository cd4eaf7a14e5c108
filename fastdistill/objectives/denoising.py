"""`Denoising`: trains a denoiser on data, as a recipe's own teacher (EDM's loss by default)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdistill.diffusion import Parametrisation, TimestepLaw, loss_weight
from fastdistill.models import Condition, Denoiser, Level
from fastdistill.objectives.augmentation import AugmentationSettings, draw_transformation
from fastdistill.objectives.base import Batch, Objective, Update
from fastdistill.ops import denoising_cotangent, log_snr_bin, renoise


class Noised(NamedTuple):
    """Clean samples at a noise level, as a network reads them."""

    level: Level
    x_t: Tensor
    model_input: Tensor


def noised_for(
    denoiser: Denoiser, batch: Batch, sample: Tensor, law: TimestepLaw, stream: str
) -> Noised:
    """Clean samples [B, ...] at times of a law, with the noise of the stream."""
    t = law.sample(denoiser.process, batch.noise, f"{stream}-t", batch.index)
    return noised_at(denoiser, denoiser.level(t), batch, sample, stream)


def noised_at(
    denoiser: Denoiser, level: Level, batch: Batch, sample: Tensor, stream: str
) -> Noised:
    """Clean samples [B, ...] at a noise level, with the noise of the stream."""
    x_t, model_input = renoise(
        sample,
        level.alpha,
        level.sigma,
        batch.noise.key(f"{stream}-noise"),
        batch.index,
        level.input_scale,
        denoiser.input_dtype,
    )
    return Noised(level, x_t, model_input)


def denoising_pair(
    prediction: Tensor,
    sample: Tensor,
    x_t: Tensor,
    level: Level,
    loss_space: Parametrisation,
    scale: float,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The weighted denoising loss of a raw prediction: (prediction, cotangent), and loss [B]."""
    weight = loss_weight(loss_space, level.alpha, level.sigma)
    cotangent, loss = denoising_cotangent(
        prediction.detach(), sample, x_t, level.coefficients, weight, scale
    )
    return (prediction, cotangent), loss


def denoising_update(
    denoiser: Denoiser,
    batch: Batch,
    sample: Tensor,
    law: TimestepLaw,
    loss_space: Parametrisation,
    stream: str,
    augmentation: AugmentationSettings | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor, Level]:
    """One weighted denoising loss of ``denoiser`` on clean samples [B, ...].

    Args:
        denoiser: the network that is trained.
        batch: what is drawn from, and the conditions.
        sample: clean samples.
        law: law of the times.
        loss_space: space of the squared error.
        stream: name of the streams.
        augmentation: ScoreAug's transformations of x_t and of the sample that is asked for.

    Returns:
        The (raw output, cotangent) pair, the loss of each sample [B], and the noise level.
    """
    noised = noised_for(denoiser, batch, sample, law, stream)
    level, told = noised.level, {}
    if augmentation is not None:
        drawn = draw_transformation(
            augmentation, batch.noise, f"{stream}-augmentation", batch.index, batch.shape
        )
        sample, noised = drawn(sample), Noised(level, drawn(noised.x_t), drawn(noised.model_input))
        told = {"omega": drawn.omega} if augmentation.conditioned else {}
    raw = denoiser.network(noised.model_input, level.noise_condition, batch.condition, **told)
    pair, loss = denoising_pair(raw, sample, noised.x_t, level, loss_space, batch.scale)
    return pair, loss, level


def drop_conditions(batch: Batch, rate: float, stream: str) -> Condition:
    """The condition of a batch with the null one in its place for a share of the samples.

    Raises:
        ValueError: where condition and null condition differ in structure.
    """
    dropped = batch.noise.uniform(stream, batch.index) < rate

    def choose(null: Tensor | None, given: Tensor | None) -> Tensor | None:
        if null is None or given is None:
            return given
        return torch.where(dropped.reshape(-1, *[1] * (given.ndim - 1)), null, given)

    leaves, spec = pytree.tree_flatten(batch.condition)
    nulls, null_spec = pytree.tree_flatten(batch.uncondition)
    if spec != null_spec or not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError(
            f"conditions are to be dropped, but they are {spec} and the null ones {null_spec}; "
            "give data with conditions and a null condition of the same structure"
        )
    return pytree.tree_unflatten(list(map(choose, nulls, leaves)), spec)


class Denoising(Objective):
    """Denoising score matching of one network, ``student``, on real data.

    Args:
        student: the denoiser that is trained.
        law: law of the training times.
        loss_space: space of the squared error; the network's own makes its target unit-weighted.
        condition_dropout: share of the samples that see the null condition, for guidance.
        augmentation: ScoreAug's transformations, for few data.

    Raises:
        ValueError: for an augmentation that the network cannot be trained with.
    """

    def __init__(
        self,
        student: Denoiser,
        law: TimestepLaw,
        loss_space: Parametrisation | None = None,
        condition_dropout: float = 0.0,
        augmentation: AugmentationSettings | None = None,
    ) -> None:
        super().__init__()
        if augmentation is not None:
            augmentation.check(student.network, "student")
        self.augmentation = augmentation
        self.student = student
        self.law = law
        self.loss_space = loss_space or student.parametrisation
        self.condition_dropout = condition_dropout

    def generate(self, batch: Batch) -> Tensor:
        assert batch.real is not None
        return batch.real

    def student_update(self, batch: Batch, sample: Tensor) -> Update:
        if self.condition_dropout > 0:
            condition = drop_conditions(batch, self.condition_dropout, "condition-dropout")
            batch = dataclasses.replace(batch, condition=condition)
        pair, loss, level = denoising_update(
            *(self.student, batch, sample, self.law, self.loss_space, "denoising"),
            self.augmentation,
        )
        bins = log_snr_bin(level.alpha, level.sigma, self.noise_bins, *self.log_snr_range)
        return Update([pair], {"loss": loss}, bins, ("loss",))
