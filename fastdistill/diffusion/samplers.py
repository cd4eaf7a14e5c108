"""Samplers. Each takes a function ``denoise(x_t, t) -> D`` and starts from noise.

The deterministic samplers integrate dx/dlambda = (x - D) / lambda in EDM's variables
x = x_t / alpha, lambda = sigma / alpha, in which every process has the same probability-flow ODE.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdistill.diffusion.noise import Noise
from fastdistill.diffusion.process import Process
from fastdistill.ops import renoise

Denoise = Callable[[Tensor, Tensor], Tensor]
Teleport = Callable[[Tensor, Sequence[float]], tuple[Tensor, Sequence[float]]]
"""Carries samples in EDM's variables from the first of the levels to a later one, and returns them
with the levels that are left: `fastdistill.gaussian.Gaussian.teleport`."""
Start = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Makes a student's first input at (alpha, sigma) [B] of standard normal noise [B, ...], as
`fastdistill.gaussian.Gaussian.marginal`."""


def karras_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> list[float]:
    """Karras' grid from sigma_max down to sigma_min, and 0 (arXiv 2206.00364, equation 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    between = max(steps - 1, 1)
    return [(high + i / between * (low - high)) ** rho for i in range(steps)] + [0.0]


def heun(
    denoise: Denoise,
    noise: Tensor,
    process: Process,
    sigmas: Sequence[float],
    teleport: Teleport | None = None,
) -> Tensor:
    """Heun's method (arXiv 2206.00364, algorithm 1), 2 n - 1 evaluations over n levels.

    Args:
        denoise: the denoiser of the process.
        noise: standard normal start [B, ...].
        process: the process that the denoiser was trained on.
        sigmas: levels of sigma / alpha from the highest to 0, as `karras_sigmas` gives them; the
            highest should be one that the process reaches.
        teleport: passes over the first steps; none if None.

    Returns:
        Samples [B, ...].
    """
    evaluate = in_edm_variables(denoise, process)
    x, sigmas = _start(noise, sigmas, teleport)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        slope = (x - evaluate(x, sigma)) / sigma
        euler = x + (next_sigma - sigma) * slope
        if next_sigma > 0:
            next_slope = (euler - evaluate(euler, next_sigma)) / next_sigma
            x = x + (next_sigma - sigma) * 0.5 * (slope + next_slope)
        else:
            x = euler
    return x


def deterministic(
    denoise: Denoise,
    noise: Tensor,
    process: Process,
    sigmas: Sequence[float],
    teleport: Teleport | None = None,
) -> Tensor:
    """Euler's method, which is DDIM with eta = 0: one evaluation a level, for few steps.

    Arguments and result are those of `heun`.
    """
    evaluate = in_edm_variables(denoise, process)
    x, sigmas = _start(noise, sigmas, teleport)
    for sigma, next_sigma in itertools.pairwise(sigmas):
        denoised = evaluate(x, sigma)
        x = denoised + (next_sigma / sigma) * (x - denoised)
    return x


def _start(
    noise: Tensor, sigmas: Sequence[float], teleport: Teleport | None
) -> tuple[Tensor, Sequence[float]]:
    """Where a deterministic sampler begins, and the levels that it goes through."""
    x = noise * sigmas[0]
    return (x, sigmas) if teleport is None else teleport(x, sigmas)


def few_step(
    student: Denoise,
    process: Process,
    times: Sequence[float],
    noise: Noise,
    index: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    start: Start | None = None,
) -> Tensor:
    """The student's sampler: denoise, renoise to the next time with fresh noise, and so on.

    One time makes a one-step generator. The first input is `starting_point`; fresh noise of the
    k-th time comes from the stream ``renoise-k``, as in training's backward simulation.

    Args:
        student: the student's denoiser.
        process: its process.
        times: its times, from the noisiest on.
        noise: source of randomness, at the step wanted.
        index: global index of each sample, int64 [B].
        shape: shape of one sample.
        dtype: dtype of the samples.
        start: makes the first input; `starting_point`'s pure noise if None.

    Returns:
        Samples [B, *shape].
    """
    t = torch.full(index.shape, times[0], device=index.device)
    x0 = student(starting_point(process, t, noise, index, shape, dtype, start), t)
    for k, time in enumerate(times[1:], start=1):
        t = torch.full(index.shape, time, device=index.device)
        x_t = renoise(x0, *process.alpha_sigma(t), noise.key(f"renoise-{k}"), index).x_t
        x0 = student(x_t, t)
    return x0


def starting_point(
    process: Process,
    t: Tensor,
    noise: Noise,
    index: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    start: Start | None = None,
) -> Tensor:
    """What the student starts from at time t  # [B, *shape]

    Pure noise of the process' scale, or what ``start`` makes of standard normal noise: a fitted
    Gaussian's marginal at t.
    """
    z = noise.normal("latents", index, shape, dtype)
    if start is not None:
        return start(z, *process.alpha_sigma(t))
    return process.start_scale(t).to(dtype).reshape(-1, *[1] * len(shape)) * z


def in_edm_variables(denoise: Denoise, process: Process) -> Callable[[Tensor, float], Tensor]:
    """D as a function of x = x_t / alpha [B, ...] and a level lambda that all samples share."""

    def evaluate(x: Tensor, sigma: float) -> Tensor:
        ratio = torch.full((x.shape[0],), sigma, device=x.device)
        t = process.time_of_ratio(ratio)
        alpha = process.alpha_sigma(t).alpha.to(x.dtype)
        return denoise(alpha.reshape(-1, *[1] * (x.ndim - 1)) * x, t)

    return evaluate
