"""Sampling from teachers and students by batches, with counter-based noise, and grids of images."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdistill.diffusion import Noise, few_step, heun, karras_sigmas, reach_of
from fastdistill.models import Condition, Denoiser

EVALUATION_STEP = 2**32 - 1
"""The step of noise that no training step uses."""


class Conditions(NamedTuple):
    """What samples are made for: trees of tensors with the samples first, or None."""

    condition: Condition = None
    uncondition: Condition = None

    def rows(self, index: Tensor) -> Conditions:
        """Those of some of the samples."""
        return Conditions(*(_rows(part, index) for part in self))


def _rows(condition: Condition, index: Tensor) -> Condition:
    return pytree.tree_map(lambda leaf: None if leaf is None else leaf[index], condition)


def sample_student(
    student: Denoiser,
    times: Sequence[float],
    conditions: Conditions,
    count: int,
    shape: Sequence[int],
    noise: Noise,
    batch: int = 1000,
) -> Tensor:
    """One- or few-step samples of a student  # [count, *shape]

    Args:
        student: the student.
        times: its times from the noisiest on.
        conditions: those of every sample.
        count: number of samples.
        shape: shape of one sample.
        noise: source of randomness at the wanted step; samples are drawn by their index.
        batch: samples that are made together.
    """

    def draw(index: Tensor) -> Tensor:
        denoise = functools.partial(_denoise, student, conditions.rows(index).condition)
        return few_step(denoise, student.process, times, noise, index, shape, start=student.start)

    return _by_batches(student, count, batch, draw)


def sample_teacher(
    teacher: Denoiser,
    steps: int,
    conditions: Conditions,
    count: int,
    shape: Sequence[int],
    noise: Noise,
    batch: int = 1000,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Samples of a teacher by `solve`; arguments are those of `sample_student`."""

    def draw(index: Tensor) -> Tensor:
        z = noise.normal("latents", index, shape)
        return solve(teacher, steps, z, conditions.rows(index), guidance_scale)

    return _by_batches(teacher, count, batch, draw)


@torch.no_grad()
def solve(
    teacher: Denoiser,
    steps: int,
    z: Tensor,
    conditions: Conditions,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Where the probability-flow ODE leads noise, by Heun's method in 2 ``steps`` - 1 evaluations.

    Args:
        teacher: the denoiser.
        steps: levels of Karras' grid.
        z: standard normal noise [B, ...].
        conditions: of each sample.
        guidance_scale: classifier-free guidance; 1 looks at the condition alone.
    """
    low, high = reach_of(teacher.process)
    sigmas = karras_sigmas(steps, max(low, 0.002), min(high, 80.0))  # EDM's, as a flow's has no end

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return teacher.guided(x_t, t, *conditions, guidance_scale)

    return heun(denoise, z, teacher.process, sigmas)


@torch.no_grad()
def _by_batches(
    denoiser: Denoiser, count: int, batch: int, draw: Callable[[Tensor], Tensor]
) -> Tensor:
    """Samples 0 ... count - 1 from ``draw(index)``, a batch at a time."""
    device = next(denoiser.parameters()).device
    return torch.cat([draw(index) for index in torch.arange(count, device=device).split(batch)])


def _denoise(denoiser: Denoiser, condition: Condition, x_t: Tensor, t: Tensor) -> Tensor:
    return denoiser(x_t, t, condition)


def balanced_labels(classes: int, count: int, device: torch.device) -> Tensor | None:
    """Labels 0 ... classes - 1 in turn, int64 [count]; None without classes."""
    return torch.arange(count, device=device) % classes if classes else None


def seconds_per_thousand(
    makers: Mapping[str, Callable[[int], Tensor]],
    device: torch.device,
    rounds: int = 9,
    count: int = 1000,
) -> dict[str, float]:
    """Seconds that each way of making images takes for a thousand, medians of several rounds.

    The ways take turns, so that what else the machine does meets all of them alike.

    Args:
        makers: functions of the number of images, by name.
        device: where they run.
        rounds: how often each is measured, after one time more for the warm-up.
        count: images of one measurement.
    """
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds + 1):  # the first is the warm-up
        for name, make in makers.items():
            start = time.perf_counter()
            make(count)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append((time.perf_counter() - start) * 1000 / count)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def save_grid(
    path: Path,
    columns: Sequence[tuple[str, Tensor]],
    rows: int,
    per_row: int,
    note: str = "",
) -> None:
    """Draw sets of images [n, C, H, W] in [-1, 1] side by side, each under its title.

    Args:
        path: the file.
        columns: (title, images); of each as many are drawn as fit.
        rows: images above each other.
        per_row: images beside each other in a column.
        note: what is written below all.
    """
    from matplotlib.figure import Figure

    pixels = max(images.shape[-1] for _, images in columns)
    inches = min(max(0.42, pixels / _DPI), 2.4)
    size = (inches * per_row * len(columns) + 0.3, inches * rows + 0.7)
    figure = Figure(figsize=size, dpi=_DPI)
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, (title, images) in zip(axes, columns, strict=True):
        axis.imshow(_tile(images[: rows * per_row].float().cpu(), per_row), cmap="gray_r")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    if note:
        figure.text(0.5, 0.01, note, fontsize=6, ha="center")
    figure.tight_layout()
    figure.savefig(path)


_DPI = 110


def _tile(images: Tensor, per_row: int) -> Tensor:
    """One picture from images [n, C, H, W] in [-1, 1], a pixel apart  # [H', W'] or [H', W', 3]"""
    padded = torch.nn.functional.pad((images.clamp(-1, 1) + 1) / 2, (1, 1, 1, 1))
    missing = -len(padded) % per_row
    padded = torch.cat((padded, padded.new_zeros(missing, *padded.shape[1:])))
    grid = padded.unflatten(0, (-1, per_row)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return grid[0] if len(grid) == 1 else grid.permute(1, 2, 0)
