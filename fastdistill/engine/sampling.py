"""Sampling from teachers and students by batches, with counter-based noise, and grids of images."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastdistill.diffusion import Noise, few_step, heun, karras_sigmas
from fastdistill.diffusion.samplers import Denoise
from fastdistill.models import Denoiser

EVALUATION_STEP = 2**32 - 1
"""The step of noise that no training step uses."""


def sample_student(
    student: Denoiser,
    times: Sequence[float],
    labels: Tensor | None,
    count: int,
    shape: Sequence[int],
    noise: Noise,
) -> Tensor:
    """One- or few-step samples of a student  # [count, *shape]

    Args:
        student: the student.
        times: its times from the noisiest on.
        labels: class of each sample [count], or None.
        count: number of samples.
        shape: shape of one sample.
        noise: source of randomness at the wanted step; samples are drawn by their index.
    """

    def draw(denoise: Denoise, index: Tensor) -> Tensor:
        return few_step(denoise, student.process, times, noise, index, shape)

    return _by_batches(student, labels, count, draw)


def sample_teacher(
    teacher: Denoiser,
    steps: int,
    labels: Tensor | None,
    count: int,
    shape: Sequence[int],
    noise: Noise,
) -> Tensor:
    """Samples of a teacher by Heun's method, 2 ``steps`` - 1 evaluations; see `sample_student`."""
    process = teacher.process
    alpha, sigma = process.alpha_sigma(process.time_of_position(torch.tensor([0.0, 1.0])))
    lowest, highest = (sigma / alpha).tolist()  # a flow's highest is infinite: take EDM's
    sigmas = karras_sigmas(steps, max(lowest, 0.002), min(highest, 80.0))

    def draw(denoise: Denoise, index: Tensor) -> Tensor:
        return heun(denoise, noise.normal("latents", index, shape), process, sigmas)

    return _by_batches(teacher, labels, count, draw)


@torch.no_grad()
def _by_batches(
    denoiser: Denoiser,
    labels: Tensor | None,
    count: int,
    draw: Callable[[Denoise, Tensor], Tensor],
    batch: int = 1000,
) -> Tensor:
    """Samples 0 ... count - 1 from ``draw(denoise, index)``, a batch at a time."""
    device = next(denoiser.parameters()).device
    batches = []
    for index in torch.arange(count, device=device).split(batch):
        condition = None if labels is None else labels[index]
        batches.append(draw(functools.partial(_denoise, denoiser, condition), index))
    return torch.cat(batches)


def _denoise(denoiser: Denoiser, condition: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
    return denoiser(x_t, t, condition)


def balanced_labels(classes: int, count: int, device: torch.device) -> Tensor | None:
    """Labels 0 ... classes - 1 in turn, int64 [count]; None without classes."""
    return torch.arange(count, device=device) % classes if classes else None


def seconds_per_thousand(
    makers: Mapping[str, Callable[[int], Tensor]], device: torch.device, rounds: int = 9
) -> dict[str, float]:
    """Seconds that each way of making images takes for a thousand, medians of several rounds.

    The ways take turns, so that what else the machine does meets all of them alike.

    Args:
        makers: functions of the number of images, by name.
        device: where they run.
        rounds: how often each is measured.
    """
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds + 1):  # the first is the warm-up
        for name, make in makers.items():
            start = time.perf_counter()
            make(1000)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def save_grid(path: Path, columns: Sequence[tuple[str, Tensor]], rows: int, per_row: int) -> None:
    """Draw sets of images [n, C, H, W] in [-1, 1] side by side, each under its title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.42 * per_row * len(columns) + 0.3, 0.42 * rows + 0.7), dpi=110)
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, (title, images) in zip(axes, columns, strict=True):
        axis.imshow(_tile(images[: rows * per_row].float().cpu(), per_row), cmap="gray_r")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path)


def _tile(images: Tensor, per_row: int) -> Tensor:
    """One picture from images [n, C, H, W] in [-1, 1], a pixel apart  # [H', W'] or [H', W', 3]"""
    padded = torch.nn.functional.pad((images.clamp(-1, 1) + 1) / 2, (1, 1, 1, 1))
    missing = -len(padded) % per_row
    padded = torch.cat((padded, padded.new_zeros(missing, *padded.shape[1:])))
    grid = padded.unflatten(0, (-1, per_row)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return grid[0] if len(grid) == 1 else grid.permute(1, 2, 0)
