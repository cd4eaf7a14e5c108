"""Group norm, SiLU and time embedding, forward and backward, beside torch's, in channels-last.

Forward x is read twice and y written, backward x and the gradient are read twice and that of x is
written: eight tensors. torch's CUDA kernels copy a channels-last tensor to contiguous memory first,
and keep x plus the embedding, the norm's value and the input.
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
from fastdistill.ops.group_norm import _group_norm_silu, _group_norm_silu_backward

GROUPS, EPS = 32, 1e-5
_SMALL: list[Shape] = [(2, 64, 4, 4)]
_CPU: list[Shape] = [(1, 320, 128, 128), (1, 1280, 32, 32)]
_CUDA: list[Shape] = [(8, 320, 128, 128), (8, 640, 64, 64), (8, 1280, 32, 32)]


class Inputs(NamedTuple):
    """One set: the image, its time embedding, the norm's parameters, and the gradient."""

    x: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    shapes = _SMALL if small else _CUDA if device.type == "cuda" else _CPU
    return (_case(shape, dtype, device) for dtype in TOLERANCE for shape in shapes)


def _case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    def image(generator: torch.Generator) -> Tensor:
        return draw(shape, dtype, generator).to(memory_format=torch.channels_last)

    def make(generator: torch.Generator) -> Inputs:
        shift = draw(shape[:2], dtype, generator)
        weight, bias = (draw(shape[1:2], dtype, generator) for _ in range(2))
        return Inputs(image(generator), shift, weight, bias, image(generator))

    def judge(inputs: Inputs) -> Judge:
        return near(_by_reference(*in_float64(inputs)), TOLERANCE[dtype])

    def leaves(inputs: Inputs) -> tuple[Tensor, ...]:
        return inputs[:-1]

    return Case(
        *("group_norm_silu", label(shape), dtype, 8 * size(shape, dtype)),
        make=make,
        variants={
            OURS: calls(_ours, tuple),
            "eager, as diffusers": forward_and_backward(_as_diffusers, leaves),
            "torch.compile, as diffusers": forward_and_backward(compiled(_as_diffusers), leaves),
            **reference_peers(_by_reference, tuple, device.type == "cuda"),
        },
        judge=judge,
    )


def _ours(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Results:
    y, mean, rstd = _group_norm_silu(x, shift, weight, bias, GROUPS, EPS, True)
    given = (grad, x, shift, weight, bias, mean, rstd, GROUPS, True, False)
    return y, *_group_norm_silu_backward(*given)[:4]


def _by_reference(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Results:
    y, mean, rstd = _group_norm_silu.reference(x, shift, weight, bias, GROUPS, EPS, True)
    given = (grad, x, shift, weight, bias, mean, rstd, GROUPS, True, False)
    return y, *_group_norm_silu_backward.reference(*given)[:4]


def _as_diffusers(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x + shift[:, :, None, None], GROUPS, weight, bias, EPS))
