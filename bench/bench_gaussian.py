"""`gaussian_transport` beside torch's matrix products, alone and with all that belongs to the map.

Two products of [B, d] and [d, r] dominate. "two bare products" is ``(x @ U) @ U.T`` and nothing
else, the least that torch can do; the eager chain adds the affine part with ``addmm``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import OURS, Case, Judge, Results, Variant, near
from bench.inputs import TOLERANCE, draw, in_float64, noise_level
from bench.peers import calls, reference_peers
from fastdistill.ops import gaussian_transport
from fastdistill.ops.gaussian import _gaussian_transport

# (batch, elements, rank): images of 64 x 64 pixels, of 32 x 32, and SDXL's latents.
SIZES = ((64, 12288, 256), (256, 3072, 128), (8, 65536, 64))
FLOOR = 0.01


class Inputs(NamedTuple):
    """One set: samples, the Gaussian, and the noise levels to go from and to."""

    x: Tensor
    mean: Tensor
    basis: Tensor
    spectrum: Tensor
    alpha: Tensor
    sigma: Tensor
    to_alpha: Tensor
    to_sigma: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    sizes = ((2, 192, 8),) if small else SIZES
    return (_case(*size, dtype, device) for dtype in TOLERANCE for size in sizes)


def _case(batch: int, d: int, rank: int, dtype: torch.dtype, device: torch.device) -> Case:
    alpha, sigma = (value.float() for value in noise_level(batch, device))
    to_sigma = 0.5 * sigma
    to_alpha = (1 - to_sigma.square()).sqrt()

    def make(generator: torch.Generator) -> Inputs:
        x = draw((batch, d), dtype, generator)
        mean = draw((d,), torch.float32, generator)
        basis = draw((d, rank), torch.float32, generator) / d**0.5
        spectrum = torch.linspace(20, 0.1, rank, device=device)
        return Inputs(x, mean, basis.to(dtype), spectrum, alpha, sigma, to_alpha, to_sigma)

    def judge(inputs: Inputs) -> Judge:
        return near(_by_reference(*in_float64(inputs)), TOLERANCE[dtype])

    def judge_products(inputs: Inputs) -> Judge:
        return near(_bare_products(inputs.x.double(), inputs.basis.double()), TOLERANCE[dtype])

    bare = calls(_bare_products, lambda inputs: (inputs.x, inputs.basis))
    # Both products read x (or write the result) and the basis.
    bytes_moved = (3 * batch * d + 2 * d * rank) * dtype.itemsize
    return Case(
        *("gaussian_transport", f"{batch}x{d}, rank {rank}", dtype, bytes_moved),
        make=make,
        flops=4 * batch * d * rank,
        variants={
            OURS: calls(partial(gaussian_transport, floor=FLOOR), tuple, keep=1),
            "two bare products": Variant(bare.bind, judge_products),
            "eager, addmm": calls(_eager, tuple),
            **reference_peers(_by_reference, tuple, autotune=True),
        },
        judge=judge,
    )


def _bare_products(x: Tensor, basis: Tensor) -> Results:
    return ((x @ basis) @ basis.T,)


def _gains(
    spectrum: Tensor, alpha: Tensor, sigma: Tensor, to_alpha: Tensor, to_sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Gains of the directions that the basis leaves out [B] and of its own [B, r]."""
    variance = torch.cat((spectrum, spectrum.new_full((1,), FLOOR)))
    squares = [value.square()[:, None] for value in (alpha, sigma, to_alpha, to_sigma)]
    before, after = squares[0] * variance + squares[1], squares[2] * variance + squares[3]
    gains = (after / before).sqrt()
    return gains[:, -1], gains[:, :-1]


def _eager(
    x: Tensor, mean: Tensor, basis: Tensor, spectrum: Tensor, alpha: Tensor, *levels: Tensor
) -> Results:
    """The affine map with as few passes as torch has for it, in the dtype of x."""
    rest, gains = _gains(spectrum, alpha, *levels)
    centred = x - (alpha[:, None] * mean).to(x.dtype)
    projected = ((gains - rest[:, None]) * (centred @ basis)).to(x.dtype)
    shifted = (levels[1][:, None] * mean + rest[:, None] * centred).to(x.dtype)
    return (torch.addmm(shifted, projected, basis.T),)


def _by_reference(
    x: Tensor, mean: Tensor, basis: Tensor, spectrum: Tensor, alpha: Tensor, *levels: Tensor
) -> Results:
    rest, gains = _gains(spectrum, alpha, *levels)
    maps = (alpha, levels[1], rest, gains, None, None, None)
    return (_gaussian_transport.reference(x, mean, basis, *maps)[0],)
