"""`diagnose`: how near a teacher is to its Gaussian at each noise level.

At (alpha, sigma), with x_t = alpha x_0 + sigma eps of data x_0 and the scores
s = (alpha D - x_t) / sigma^2 of teacher and Gaussian,

    score error     sqrt(E|s_T - s_G|^2 / E|s_T|^2)       = sqrt(E|alpha (D_T - D_G)|^2 /
                                                                 E|alpha D_T - x_t|^2)
    denoiser error  sqrt(E|D_T - D_G|^2 / E|D_T - mu|^2)

The score error is that of the direction in which a sampler moves, and falls with the noise. The
denoiser error is that of what the network adds to the data's mean.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.diffusion import Noise
from fastdistill.gaussian.model import Gaussian, GaussianMixture
from fastdistill.models import Condition, Denoiser

LOWEST, HIGHEST = 0.01, 80.0


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Errors by noise level, from the least noise to the most."""

    ratios: tuple[float, ...]
    """sigma / alpha of each level."""
    score_errors: tuple[float, ...]
    """Relative error of the Gaussian's score, the teacher's being right."""
    denoiser_errors: tuple[float, ...]
    """Relative error of its denoiser."""
    guidance_scale: float = 1.0
    """Guidance of the teacher, and of a mixture of classes."""

    @property
    def log_snrs(self) -> tuple[float, ...]:
        """ln(alpha^2 / sigma^2) of each level."""
        return tuple(-2 * math.log(ratio) for ratio in self.ratios)

    def level(self, bound: float) -> float | None:
        """The least sigma / alpha from which on the score error is at most ``bound``.

        One of the levels measured; None where it is larger at the highest already.
        """
        found = None
        for ratio, error in zip(reversed(self.ratios), reversed(self.score_errors), strict=True):
            if not error <= bound:
                break
            found = ratio
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return dataclasses.asdict(self) | {"log_snrs": self.log_snrs}

    def save_plot(self, path: Path | str, bound: float | None = None) -> None:
        """Draw both errors against log-SNR, noise growing to the left, with the bound's level."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4), dpi=120)
        axes = figure.subplots()
        axes.semilogy(self.log_snrs, self.score_errors, "o-", ms=3, label="score")
        axes.semilogy(self.log_snrs, self.denoiser_errors, "s--", ms=3, label="denoiser")
        level = None if bound is None else self.level(bound)
        if bound is not None:
            axes.axhline(bound, color="gray", lw=0.8, ls=":", label=f"bound {bound:g}")
        if level is not None:
            text = f"below it from sigma/alpha = {level:.3g} on"
            axes.axvspan(min(self.log_snrs), -2 * math.log(level), alpha=0.12, label=text)
        axes.set_xlabel("log-SNR, ln(alpha$^2$ / sigma$^2$)  (noise to the left)")
        axes.set_ylabel("relative error of the Gaussian")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path)


def noise_levels(teacher: Denoiser, count: int = 24) -> list[float]:
    """``count`` ratios sigma / alpha, even in log-SNR, that the teacher's process reaches."""
    process = teacher.process
    alpha, sigma = process.alpha_sigma(process.time_of_position(torch.tensor([0.0, 1.0])))
    lowest, highest = (sigma / alpha).tolist()
    low, high = math.log(max(lowest, LOWEST)), math.log(min(highest, HIGHEST))
    return [math.exp(low + k / max(count - 1, 1) * (high - low)) for k in range(count)]


@torch.no_grad()
def diagnose(
    teacher: Denoiser,
    gaussian: Gaussian | GaussianMixture,
    samples: Tensor,
    ratios: Sequence[float] | None = None,
    condition: Condition = None,
    uncondition: Condition = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch: int = 256,
) -> Diagnosis:
    """Measure the Gaussian's error as the teacher's stand-in, level by level.

    Args:
        teacher: the denoiser.
        gaussian: fitted to its data; a mixture of classes is asked by the labels in ``condition``.
        samples: clean data of the teacher [n, ...], on its device; the same at every level.
        ratios: sigma / alpha of the levels, from the least; `noise_levels` if None.
        condition: of each sample, or None.
        uncondition: the null condition, for guidance.
        guidance_scale: of teacher and Gaussian alike.
        seed: of the noise.
        batch: samples that are denoised together.

    Raises:
        ValueError: for samples of another shape, and ratios that do not rise.
    """
    levels = noise_levels(teacher) if ratios is None else list(ratios)
    if any(later <= earlier for earlier, later in itertools.pairwise(levels)):
        raise ValueError(f"ratios are {levels}; expected rising ones")
    noise = Noise(seed, samples.device)
    mean = _mean(gaussian).to(samples)
    errors = []
    for number, ratio in enumerate(levels):
        noise.at(number)
        sums = torch.zeros(4, dtype=torch.float64, device=samples.device)
        for index in torch.arange(len(samples), device=samples.device).split(batch):
            x0 = samples[index]
            t = teacher.process.time_of_ratio(torch.full((len(x0),), ratio, device=x0.device))
            alpha, sigma = teacher.process.alpha_sigma(t)
            shape = (-1, *[1] * (x0.ndim - 1))
            a, s = alpha.reshape(shape), sigma.reshape(shape)
            x_t = a * x0 + s * noise.normal("diagnosis", index, x0.shape[1:])
            given, null = _rows(condition, index), _rows(uncondition, index)
            theirs = teacher.guided(x_t, t, given, null, guidance_scale)
            ours = gaussian_denoised(gaussian, x_t, alpha, sigma, given, null, guidance_scale)
            gap = (theirs - ours).double()
            parts = (a * gap, a * theirs - x_t, gap, theirs - mean)
            sums += torch.stack([part.double().square().sum() for part in parts])
        score, whole, denoiser, signal = sums.tolist()
        errors.append((_root(score, whole), _root(denoiser, signal)))
    scores, denoisers = zip(*errors, strict=True)
    return Diagnosis(tuple(levels), scores, denoisers, guidance_scale)


def gaussian_denoised(
    gaussian: Gaussian | GaussianMixture,
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    condition: Condition,
    uncondition: Condition,
    guidance_scale: float,
) -> Tensor:
    """The stand-in for a (guided) teacher's denoised sample  # [B, ...]"""
    conditional = gaussian.denoise(x_t, alpha, sigma, labels_of(gaussian, condition))
    if guidance_scale == 1 or not by_class(gaussian):
        return conditional  # without classes both are one, and so is what guidance makes of them
    other = gaussian.denoise(x_t, alpha, sigma, labels_of(gaussian, uncondition))
    return other + guidance_scale * (conditional - other)


def by_class(gaussian: Gaussian | GaussianMixture) -> bool:
    """Whether conditions mean something to it."""
    return isinstance(gaussian, GaussianMixture) and gaussian.by_class


def labels_of(gaussian: Gaussian | GaussianMixture, condition: Condition) -> Tensor | None:
    """The labels that a mixture of classes reads; None for others.

    Raises:
        ValueError: where the conditions are no labels.
    """
    if not by_class(gaussian):
        return None
    if not isinstance(condition, Tensor) or condition.dtype != torch.int64:
        raise ValueError("a mixture of classes needs int64 labels as conditions")
    return condition


def _rows(condition: Condition, index: Tensor) -> Condition:
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda leaf: None if leaf is None else leaf[index], condition)


def _mean(gaussian: Gaussian | GaussianMixture) -> Tensor:
    if isinstance(gaussian, Gaussian):
        return gaussian.mean
    means = torch.stack([gaussian[k].mean for k in range(len(gaussian))])
    weights = gaussian.log_weights.exp().to(means)
    return torch.tensordot(weights, means, dims=1)


def _root(numerator: float, denominator: float) -> float:
    return math.sqrt(numerator / denominator) if denominator else math.inf
