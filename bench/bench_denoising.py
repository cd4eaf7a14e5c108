"""`denoising_cotangent` beside the critic losses that DMD2 and FastGen write, by autograd.

For EDM networks they form the denoiser and weight its squared error; for epsilon networks a plain
MSE between output and noise needs no conversion at all, and is the leanest rival there can be. On
epsilon outputs with the weight (alpha / sigma)^2 the two are the same loss.
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
from fastdistill.diffusion import Epsilon, loss_weight
from fastdistill.ops import denoising_cotangent
from fastdistill.ops.denoising import _denoising_cotangent


class Inputs(NamedTuple):
    """One set: raw output, clean and noisy samples, and the noise between them."""

    prediction: Tensor
    x0: Tensor
    x_t: Tensor
    noise: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    return (_case(shape, dtype, device) for shape, dtype in samples(device, small))


def _case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    alpha, sigma = (value.float() for value in noise_level(shape[0], device))
    coefficients = Epsilon().coefficients(alpha, sigma)
    weight = loss_weight(Epsilon(), alpha, sigma)
    scale = 1 / shape[0]
    reference = _denoising_cotangent.reference

    def make(generator: torch.Generator) -> Inputs:
        prediction, x0, noise = (draw(shape, dtype, generator) for _ in range(3))
        x_t = wide(alpha, x0) * x0.float() + wide(sigma, x0) * noise.float()
        return Inputs(prediction, x0, x_t.to(dtype), noise)

    def ours(prediction: Tensor, x0: Tensor, x_t: Tensor) -> Results:
        return denoising_cotangent(prediction, x0, x_t, coefficients, weight, scale)

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        return (*inputs[:3], *coefficients, weight, scale)

    def output(inputs: Inputs) -> tuple[Tensor, ...]:
        return (inputs.prediction,)

    def denoiser_loss(prediction: Tensor, x0: Tensor, x_t: Tensor) -> Tensor:
        a, b, w = (wide(value, x0) for value in (*coefficients, weight))
        denoised = a * x_t.float() + b * prediction.float()
        return torch.mean(w * (denoised - x0) ** 2)

    return Case(
        *("denoising_cotangent", label(shape), dtype, 4 * size(shape, dtype)),
        make=make,
        variants={
            OURS: calls(ours, lambda inputs: inputs[:3], keep=1),
            "eager, denoiser MSE": by_autograd(denoiser_loss, output, lambda inputs: inputs[1:3]),
            "eager, epsilon MSE": by_autograd(F.mse_loss, output, lambda inputs: inputs[3:]),
            **reference_peers(reference, arguments, device.type == "cuda", keep=1),
        },
        judge=lambda inputs: near(reference(*in_float64(arguments(inputs)))[:1], TOLERANCE[dtype]),
    )
