"""Ops of transformer blocks, forward and backward, beside diffusers' chains, eager and compiled.

`modulated_norm` with a gated residual is the step between attention and feed-forward of DiT, SD3
and Flux; `rms_norm_rope` with a second stream is a query or key of Flux. Bytes are those of both
passes. CPU tensors run the references: what is timed there is torch's own kernels in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OURS, Case, Results, Run, Variant, near
from bench.inputs import TOLERANCE, Shape, draw, in_float64, label
from bench.inputs import size_in_bytes as size
from bench.peers import compiled
from fastdistill.ops import gated_residual, modulated_norm, rms_norm_rope

Function = Callable[..., tuple[Tensor, ...]]

_SMALL = (2, 5, 16)
_TOKENS = {"cpu": [(4, 1024, 1152)], "cuda": [(8, 4096, 1152), (4, 4608, 3072), (2, 1024, 1152)]}
_HEADS = {"cpu": [(1, 1024, 24, 64)], "cuda": [(2, 4096, 24, 128), (2, 4096, 24, 64)]}
_TEXT = 333


class Inputs(NamedTuple):
    """Leaves of the function, and the gradients of its results."""

    leaves: tuple[Tensor, ...]
    pulls: tuple[Tensor, ...]


def norms(device: torch.device, small: bool) -> Iterator[Case]:
    """Gated residual, norm and modulation: ten tensors of tokens move."""
    shapes = [_SMALL] if small else _TOKENS[device.type]
    for dtype in TOLERANCE:
        for shape in shapes:
            leaves = [shape, shape, (shape[0], 6 * shape[2])]
            pair = (fused_norm, eager_norm)
            yield _case("modulated_norm", label(shape), dtype, 10, *pair, leaves, [shape, shape])


def residuals(device: torch.device, small: bool) -> Iterator[Case]:
    """Gated residuals alone: six tensors of tokens move."""
    shapes = [_SMALL] if small else _TOKENS[device.type]
    for dtype in TOLERANCE:
        for shape in shapes:
            leaves = [shape, shape, (shape[0], 6 * shape[2])]
            pair = (fused_residual, eager_residual)
            yield _case("gated_residual", label(shape), dtype, 6, *pair, leaves, [shape])


def ropes(device: torch.device, small: bool) -> Iterator[Case]:
    """Queries of two streams, normalised, joined and turned: five tensors of heads move."""
    shapes = [(2, 5, 2, 8)] if small else _HEADS[device.type]
    for dtype in TOLERANCE:
        for batch, tokens, heads, channels in shapes:
            image, text = ((batch, t, heads, channels) for t in (tokens, _TEXT))
            joint = (batch, tokens + _TEXT, heads, channels)
            leaves = [image, (channels,), text, (channels,)]
            generator = torch.Generator().manual_seed(0)
            angles = torch.randn(2, joint[1], channels, generator=generator).to(device)
            pair = (_turned(fused_rope, angles), _turned(eager_rope, angles))
            yield _case("rms_norm_rope", label(joint), dtype, 5, *pair, leaves, [joint])


def _case(
    op: str,
    name: str,
    dtype: torch.dtype,
    moved: int,
    fused: Function,
    eager: Function,
    leaves: list[Shape],
    results: list[Shape],
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        drawn = [tuple(draw(s, dtype, generator) for s in shapes) for shapes in (leaves, results)]
        return Inputs(*drawn)

    def judge(inputs: Inputs) -> Any:
        wide = Inputs(*(in_float64(values) for values in inputs))
        return near(_bind(eager, wide)(), TOLERANCE[dtype])

    return Case(
        *(op, name, dtype, moved * size(results[0], dtype)),
        make=make,
        variants={
            OURS: Variant(lambda inputs: _bind(fused, inputs)),
            "eager, as diffusers": Variant(lambda inputs: _bind(eager, inputs)),
            "torch.compile of diffusers'": Variant(lambda inputs: _bind(compiled(eager), inputs)),
        },
        judge=judge,
    )


def _bind(function: Function, inputs: Inputs) -> Run:
    live = [value.detach().requires_grad_() for value in inputs.leaves]

    def run() -> Results:
        results = function(*live)
        gradients = torch.autograd.grad(results, live, inputs.pulls)
        return (*(value.detach() for value in results), *gradients)

    return run


def fused_norm(x: Tensor, h: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    gate, scale, shift, *_ = emb.chunk(6, dim=1)
    return tuple(modulated_norm(x, scale=scale, shift=shift, residual=h, gate=gate))


def eager_norm(x: Tensor, h: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    gate, scale, shift, *_ = emb.chunk(6, dim=1)
    total = x + gate[:, None] * h
    return total, F.layer_norm(total, total.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + (
        shift[:, None]
    )


def fused_residual(x: Tensor, h: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    return (gated_residual(x, h, emb.chunk(6, dim=1)[0]),)


def eager_residual(x: Tensor, h: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    return (x + emb.chunk(6, dim=1)[0][:, None] * h,)


def _turned(function: Function, angles: Tensor) -> Function:
    def turned(*leaves: Tensor) -> tuple[Tensor, ...]:
        return function(angles, *leaves)

    return turned


def fused_rope(angles: Tensor, x: Tensor, w: Tensor, text: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (rms_norm_rope(x, w, text, v, rotary=(angles[0], angles[1])),)


def eager_rope(angles: Tensor, x: Tensor, w: Tensor, text: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """diffusers' `RMSNorm` and `apply_rotary_emb`, in its dtypes (float64 in float64)."""

    def norm(value: Tensor, weight: Tensor) -> Tensor:
        variance = value.to(compute).pow(2).mean(-1, keepdim=True)
        return (value * torch.rsqrt(variance + 1e-6)).to(weight.dtype) * weight

    compute = torch.promote_types(x.dtype, torch.float32)
    joint = torch.cat([norm(x, w), norm(text, v)], dim=1)
    cos, sin = (angle[None, :, None].to(compute) for angle in angles)
    even, odd = joint.reshape(*joint.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(3)
    return ((joint.to(compute) * cos + turned.to(compute) * sin).to(x.dtype),)
