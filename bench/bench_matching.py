"""`matching_cotangent` beside the eager chains of FastGen and DMD2, and torch.compile.

The chains do what those engines do: convert three raw epsilon outputs to x0 in float64, guide,
normalise, form a pseudo-target, and let autograd differentiate an MSE. With guidance the op reads
five tensors and writes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OURS, Case, Results, near
from bench.inputs import TOLERANCE, Shape, draw, in_float64, label, noise_level, samples
from bench.inputs import size_in_bytes as size
from bench.peers import by_autograd, calls, reference_peers, wide
from fastdistill.diffusion import Epsilon
from fastdistill.ops import matching_cotangent
from fastdistill.ops.matching import _matching_cotangent

GUIDANCE = 7.5


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
    alpha, sigma = noise_level(shape[0], device)
    coefficients = Epsilon().coefficients(alpha.float(), sigma.float())
    scale = 1 / shape[0]
    reference = _matching_cotangent.reference

    def make(generator: torch.Generator) -> Inputs:
        return Inputs(*(draw(shape, dtype, generator) for _ in Inputs._fields))

    def ours(x0: Tensor, x_t: Tensor, teacher: Tensor, uncond: Tensor, critic: Tensor) -> Results:
        return matching_cotangent(
            *(x0, x_t, teacher, coefficients, critic, coefficients),
            teacher_uncond=uncond,
            guidance_scale=GUIDANCE,
            scale=scale,
        )

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        x0, x_t, teacher, uncond, critic = inputs
        networks = (teacher, *coefficients, critic, *coefficients, uncond, GUIDANCE)
        return (x0, x_t, *networks, None, 0.0, None, True, scale, dtype)

    def sample(inputs: Inputs) -> tuple[Tensor, ...]:
        return (inputs.x0,)

    def rest(inputs: Inputs) -> tuple[Tensor, ...]:
        return (*inputs[1:], alpha, sigma)

    return Case(
        *("matching_cotangent", label(shape), dtype, 6 * size(shape, dtype)),
        make=make,
        variants={
            OURS: calls(ours, tuple, keep=1),
            "eager, as FastGen": by_autograd(fastgen, sample, rest),
            "eager, as DMD2": by_autograd(dmd2, sample, rest),
            **reference_peers(reference, arguments, device.type == "cuda", keep=1),
        },
        judge=lambda inputs: near(reference(*in_float64(arguments(inputs)))[:1], TOLERANCE[dtype]),
    )


def _x0_in_float64(x_t: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Epsilon to x0 in float64, rounded back."""
    x0 = (x_t.double() - wide(sigma, x_t) * eps.double()) / wide(alpha, x_t)
    return x0.to(x_t.dtype)


def fastgen(
    x: Tensor, x_t: Tensor, cond: Tensor, uncond: Tensor, critic: Tensor, *level: Tensor
) -> Tensor:
    """FastGen's student tail: x0 of each network, guidance, float32 weight, pseudo-target MSE."""
    with torch.no_grad():
        fake, real, negative = (_x0_in_float64(x_t, eps, *level) for eps in (critic, cond, uncond))
        real = real + (GUIDANCE - 1) * (real - negative)
        dims = tuple(range(1, x.ndim))
        distance = (x.float() - real.float()).abs().mean(dim=dims, keepdim=True)
        gradient = (fake - real) * (1 / (distance + 1e-6)).to(x.dtype)
        target = x - gradient
    return 0.5 * F.mse_loss(x, target)


def dmd2(
    x: Tensor, x_t: Tensor, cond: Tensor, uncond: Tensor, critic: Tensor, *level: Tensor
) -> Tensor:
    """DMD2's SDXL tail: everything in float64, nan_to_num, pseudo-target MSE."""
    with torch.no_grad():
        guided = uncond + GUIDANCE * (cond - uncond)
        alpha, sigma = (wide(value, x_t) for value in level)
        fake = (x_t.double() - sigma * critic.double()) / alpha
        real = (x_t.double() - sigma * guided.double()) / alpha
        p_real = x.double() - real
        p_fake = x.double() - fake
        dims = tuple(range(1, x.ndim))
        gradient = (p_real - p_fake) / p_real.abs().mean(dim=dims, keepdim=True)
        gradient = torch.nan_to_num(gradient)
    return 0.5 * F.mse_loss(x.double(), (x.double() - gradient).detach())
