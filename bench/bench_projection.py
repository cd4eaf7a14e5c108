"""`projection_cotangents` beside SiD's loss as its authors write it, differentiated by autograd.

Score identity distillation with a guided teacher: five tensors read, a cotangent of each written.
The chain forms both denoisers in float32 from the raw outputs, masks samples with NaNs, divides by
the detached mean |x0 - D| and lets autograd do the rest; compiled, it is spared the mask, whose
branch waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import OURS, Case, Results, Variant, near
from bench.inputs import TOLERANCE, Shape, draw, in_float64, label, noise_level, samples
from bench.inputs import size_in_bytes as size
from bench.peers import by_autograd, calls, compiled, reference_peers, wide
from fastdistill.diffusion import Epsilon
from fastdistill.ops import Coefficients, Distance, projection_cotangents
from fastdistill.ops.projection import _projection_cotangents

GUIDANCE = 4.5
ALPHA = 1.2


class Inputs(NamedTuple):
    """One set: samples and raw epsilon outputs, all of one shape."""

    x0: Tensor
    x_t: Tensor
    teacher: Tensor
    uncond: Tensor
    critic: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    return (_case(shape, dtype, device) for shape, dtype in samples(device, small))


def _case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    alpha, sigma = (value.float() for value in noise_level(shape[0], device))
    coefficients = Epsilon().coefficients(alpha, sigma)
    half = torch.full_like(alpha, 0.5)
    distance = Distance.squared_l2()
    scale = 1 / shape[0]
    reference = _projection_cotangents.reference
    loss = partial(sid, coefficients, scale)
    masked = partial(loss, masked=True)

    def make(generator: torch.Generator) -> Inputs:
        return Inputs(*(draw(shape, dtype, generator) for _ in Inputs._fields))

    def ours(x0: Tensor, x_t: Tensor, teacher: Tensor, uncond: Tensor, critic: Tensor) -> Results:
        found = projection_cotangents(
            *(x0, x_t, teacher, coefficients, critic, coefficients),
            distance=distance,
            alpha=ALPHA,
            teacher_uncond=uncond,
            guidance_scale=GUIDANCE,
            weight=half,
            normalise=True,
            scale=scale,
        )
        assert found.teacher_uncond is not None
        return found.x0, found.x_t, found.teacher, found.teacher_uncond, found.critic

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        x0, x_t, teacher, uncond, critic = inputs
        networks = (teacher, *coefficients, critic, *coefficients, uncond, GUIDANCE)
        return (x0, x_t, *networks, half, None, *distance, ALPHA, True, scale)

    def nothing(inputs: Inputs) -> tuple[Tensor, ...]:
        return ()

    return Case(
        *("projection_cotangents", label(shape), dtype, 10 * size(shape, dtype)),
        make=make,
        variants={
            OURS: calls(ours, tuple),
            "eager, as SiD": Variant(by_autograd(masked, tuple, nothing).bind, waits=True),
            "torch.compile of SiD's": by_autograd(compiled(loss), tuple, nothing),
            **reference_peers(reference, arguments, device.type == "cuda", keep=5),
        },
        judge=lambda inputs: near(reference(*in_float64(arguments(inputs)))[:5], TOLERANCE[dtype]),
    )


def sid(
    coefficients: Coefficients,
    scale: float,
    x0: Tensor,
    x_t: Tensor,
    teacher: Tensor,
    uncond: Tensor,
    critic: Tensor,
    masked: bool = False,
) -> Tensor:
    """SiD's generator loss from raw outputs, summed over samples and elements."""
    a, b = (wide(value, x_t) for value in coefficients)
    guided = uncond + GUIDANCE * (teacher - uncond)
    real = a * x_t.float() + b * guided.float()
    fake = a * x_t.float() + b * critic.float()
    if masked:
        bad = [value.isnan().flatten(1).any(dim=1) for value in (x0, real, fake)]
        lost = bad[0] | bad[1] | bad[2]
        if lost.any():
            x0, real, fake = x0[~lost], real[~lost], fake[~lost]
    with torch.no_grad():
        dims = tuple(range(1, x0.ndim))
        distance = (x0 - real).abs().float().mean(dim=dims, keepdim=True).clip(min=1e-5)
    loss = (real - fake) * ((real - x0) - ALPHA * (real - fake)) / distance
    return loss.sum() * scale
