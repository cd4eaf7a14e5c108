"""`consistency_cotangent` beside iCT's and ECT's loss by autograd, with the target's conversion.

The online network's raw output and the target's are read with their noisy samples, one cotangent is
written. ECT's replacement of NaNs and its mask for r = 0 are left out of the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import OURS, Case, Results, near
from bench.inputs import TOLERANCE, Shape, draw, in_float64, label, noise_level, samples
from bench.inputs import size_in_bytes as size
from bench.peers import by_autograd, calls, compiled, reference_peers, wide
from fastdistill.diffusion import EDMPreconditioning
from fastdistill.ops import Coefficients, Distance, consistency_cotangent
from fastdistill.ops.consistency import _consistency_cotangent


class Inputs(NamedTuple):
    """One set: raw outputs and noisy samples at t and at the earlier r."""

    prediction: Tensor
    x_t: Tensor
    target: Tensor
    x_r: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    return (_case(shape, dtype, device) for shape, dtype in samples(device, small))


def _case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    t = noise_level(shape[0], device)[1].float()
    r, one = 0.8 * t, torch.ones_like(t)
    at_t, at_r = (EDMPreconditioning().coefficients(one, time) for time in (t, r))
    weight, scale = 1 / (t - r), 1 / shape[0]
    distance = Distance.pseudo_huber(0.00054 * torch.Size(shape[1:]).numel() ** 0.5)
    reference = _consistency_cotangent.reference
    loss = partial(ect, at_t, at_r, weight, distance.offset, scale)

    def make(generator: torch.Generator) -> Inputs:
        return Inputs(*(draw(shape, dtype, generator) for _ in Inputs._fields))

    def ours(prediction: Tensor, x_t: Tensor, target: Tensor, x_r: Tensor) -> Results:
        return consistency_cotangent(
            *(prediction, x_t, at_t, target),
            distance=distance,
            target_x=x_r,
            target_coefficients=at_r,
            weight=weight,
            scale=scale,
        )

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        prediction, x_t, target, x_r = inputs
        return (prediction, x_t, *at_t, target, x_r, *at_r, weight, *distance, scale)

    def output(inputs: Inputs) -> tuple[Tensor, ...]:
        return (inputs.prediction,)

    def rest(inputs: Inputs) -> tuple[Tensor, ...]:
        return inputs[1:]

    return Case(
        *("consistency_cotangent", label(shape), dtype, 5 * size(shape, dtype)),
        make=make,
        variants={
            OURS: calls(ours, tuple, keep=1),
            "eager, as ECT": by_autograd(loss, output, rest),
            "torch.compile of ECT's": by_autograd(compiled(loss), output, rest),
            **reference_peers(reference, arguments, device.type == "cuda", keep=1),
        },
        judge=lambda inputs: near(reference(*in_float64(arguments(inputs)))[:1], TOLERANCE[dtype]),
    )


def ect(
    at_t: Coefficients,
    at_r: Coefficients,
    weight: Tensor,
    c: float,
    scale: float,
    prediction: Tensor,
    x_t: Tensor,
    target: Tensor,
    x_r: Tensor,
) -> Tensor:
    """Pseudo-Huber distance of whole samples between the two times, weighted by 1 / (t - r)."""

    def denoised(x: Tensor, output: Tensor, coefficients: Coefficients) -> Tensor:
        a, b = (wide(value, x) for value in coefficients)
        return a * x.float() + b * output.float()

    with torch.no_grad():
        aim = denoised(x_r, target, at_r)
    loss = (denoised(x_t, prediction, at_t) - aim) ** 2
    loss = torch.sum(loss.reshape(loss.shape[0], -1), dim=-1)
    loss = torch.sqrt(loss + c**2) - c
    return (loss * weight).sum() * scale
