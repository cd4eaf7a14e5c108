"""`sum_of_squares` beside torch's norms, of one flat tensor and of the 60 tensors it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import OURS, Case, Judge, Results, near
from bench.inputs import draw_long
from bench.peers import calls, reference_peers, split_like_a_network
from fastdistill.ops import sum_of_squares
from fastdistill.ops.norm import _sum_of_squares

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
"""torch's norms lose digits of long tensors in float32, and round those of bfloat16 pieces."""


class Inputs(NamedTuple):
    """One set: a flat gradient."""

    value: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    counts = (1000,) if small else (100_000_000, 1_000_000)
    return (_case(count, dtype, device) for dtype in TOLERANCE for count in counts)


def _case(count: int, dtype: torch.dtype, device: torch.device) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return Inputs(draw_long(count, dtype, generator))

    def judge(inputs: Inputs) -> Judge:
        return near((exact_sum_of_squares(inputs.value),), TOLERANCE[dtype])

    return Case(
        *("sum_of_squares", f"{count:,}", dtype, count * dtype.itemsize),
        make=make,
        variants={
            OURS: calls(lambda value: (sum_of_squares(value),), tuple),
            "torch vector_norm": calls(_vector_norm, tuple),
            "torch foreach norm": calls(_total_norm, lambda inputs: split_like_a_network(*inputs)),
            **reference_peers(_by_reference, tuple, device.type == "cuda"),
        },
        judge=judge,
    )


def exact_sum_of_squares(value: Tensor) -> Tensor:
    """In float64, piece by piece, so that no long tensor is doubled."""
    return torch.stack([part.double().square().sum() for part in value.split(2**22)]).sum()


def _vector_norm(value: Tensor) -> Results:
    return (torch.linalg.vector_norm(value, dtype=torch.float32).square(),)


def _total_norm(*tensors: Tensor) -> Results:
    """As `torch.nn.utils.clip_grad_norm_` takes it."""
    return (torch.nn.utils.get_total_norm(tensors, foreach=True).square(),)


def _by_reference(value: Tensor) -> Results:
    return (_sum_of_squares.reference(value),)
