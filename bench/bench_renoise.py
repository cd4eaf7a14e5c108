"""`renoise` beside the eager chains of FastGen and DMD2, and torch.compile.

One tensor read, two written, noise included. The chains draw torch's noise, which is judged by its
moments; the reference draws ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import OURS, Case, Judge, Results, Variant, near
from bench.inputs import TOLERANCE, Shape, draw, in_float64, label, noise_level, samples
from bench.inputs import size_in_bytes as size
from bench.peers import calls, compiled, reference_peers, standard_normal, wide
from fastdistill.diffusion import Noise
from fastdistill.ops import renoise
from fastdistill.ops.renoise import _renoise


class Inputs(NamedTuple):
    """One set: clean samples."""

    x0: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    return (_case(shape, dtype, device) for shape, dtype in samples(device, small))


def _case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    level = noise_level(shape[0], device)
    alpha, sigma = (value.float() for value in level)
    c_in = (1 + sigma**2).rsqrt()
    key = Noise(0, device).key("bench")
    index = torch.arange(shape[0], device=device)

    def make(generator: torch.Generator) -> Inputs:
        return Inputs(draw(shape, dtype, generator))

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        return (inputs.x0, alpha, sigma, key, index, c_in, dtype)

    def judge(inputs: Inputs) -> Judge:
        return near(_renoise.reference(*in_float64(arguments(inputs))), TOLERANCE[dtype])

    def judge_noise(inputs: Inputs) -> Judge:
        x0 = inputs.x0.double()

        def judge(found: Results) -> str | None:
            noisy = found[0].double()
            scaled = near((wide(c_in, x0) * noisy,), TOLERANCE[dtype])(found[1:])
            noise = (noisy - wide(alpha, x0) * x0) / wide(sigma, x0)
            return scaled or standard_normal(noise) or standard_normal((noise + x0) / 2**0.5)

        return judge

    def chain(function: Any, *numbers: Tensor) -> Variant:
        return Variant(calls(function, lambda inputs: (inputs.x0, *numbers)).bind, judge_noise)

    return Case(
        *("renoise", label(shape), dtype, 3 * size(shape, dtype)),
        make=make,
        variants={
            OURS: calls(renoise, arguments),
            "eager, as FastGen": chain(fastgen, *level, c_in),
            "eager, as DMD2": chain(dmd2, alpha, sigma, c_in),
            **reference_peers(_renoise.reference, arguments, device.type == "cuda"),
            "torch.compile, torch's noise": chain(compiled(dmd2), alpha, sigma, c_in),
        },
        judge=judge,
    )


def fastgen(x0: Tensor, alpha: Tensor, sigma: Tensor, c_in: Tensor) -> Results:
    """FastGen: noise, the forward process in float64, the scaled input."""
    eps = torch.randn_like(x0)
    x_t = (wide(alpha, x0) * x0.double() + wide(sigma, x0) * eps.double()).to(x0.dtype)
    return x_t, (wide(c_in, x0) * x_t).to(x0.dtype)


def dmd2(x0: Tensor, alpha: Tensor, sigma: Tensor, c_in: Tensor) -> Results:
    """DMD2: diffusers' add_noise in the samples' own dtype, the scaled input."""
    eps = torch.randn_like(x0)
    x_t = wide(alpha, x0).to(x0.dtype) * x0 + wide(sigma, x0).to(x0.dtype) * eps
    return x_t, wide(c_in, x0).to(x0.dtype) * x_t
