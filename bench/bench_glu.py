"""GEGLU forward and backward beside diffusers' chunk, gelu and product, eager and compiled.

Forward the projection is read and the value written, backward the projection and the value's
gradient are read and the projection's gradient is written: eight halves. diffusers' chain reads and
writes 18, four of them to put the two halves' gradients into one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import OURS, Case, Judge, Results, near
from bench.inputs import TOLERANCE, Shape, draw, in_float64, label
from bench.inputs import size_in_bytes as size
from bench.peers import calls, compiled, forward_and_backward, reference_peers
from fastdistill.ops import geglu, geglu_backward
from fastdistill.ops.glu import _geglu, _geglu_backward

# (batch, tokens, width of a half): SDXL's transformer blocks at 1,024 pixels, SD 1.5's at 512.
_SMALL: list[Shape] = [(2, 3, 8)]
_CPU: list[Shape] = [(1, 4096, 2560), (1, 4096, 1280)]
_CUDA: list[Shape] = [(8, 4096, 2560), (8, 1024, 5120), (1, 4096, 2560)]


class Inputs(NamedTuple):
    """One set: the projection's output, and the gradient of the value."""

    x: Tensor
    grad: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    shapes = _SMALL if small else _CUDA if device.type == "cuda" else _CPU
    return (_case(shape, dtype, device) for dtype in TOLERANCE for shape in shapes)


def _case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        x = draw((*shape[:-1], 2 * shape[-1]), dtype, generator)
        return Inputs(x, draw(shape, dtype, generator))

    def judge(inputs: Inputs) -> Judge:
        return near(_by_reference(*in_float64(inputs)), TOLERANCE[dtype])

    def leaves(inputs: Inputs) -> tuple[Tensor, ...]:
        return (inputs.x,)

    return Case(
        *("geglu", label(shape), dtype, 8 * size(shape, dtype)),
        make=make,
        variants={
            OURS: calls(_ours, tuple),
            "eager, as diffusers": forward_and_backward(_as_diffusers, leaves),
            "torch.compile, as diffusers": forward_and_backward(compiled(_as_diffusers), leaves),
            **reference_peers(_by_reference, tuple, device.type == "cuda"),
        },
        judge=judge,
    )


def _ours(x: Tensor, grad: Tensor) -> Results:
    return geglu(x), geglu_backward(grad, x)[0]


def _by_reference(x: Tensor, grad: Tensor) -> Results:
    value = _geglu.reference(x, "none")
    return value, _geglu_backward.reference(grad, x, "none", False)[0]


def _as_diffusers(x: Tensor) -> Tensor:
    a, g = x.chunk(2, dim=-1)
    return a * F.gelu(g)
