"""`normal` beside `torch.randn`, which keeps a state, and torch.compile of the same noise.

Nothing is read and one tensor written. torch's noise is another, and judged by its moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import OURS, Case, Judge, Results, Run, Variant, near
from bench.inputs import TOLERANCE, Shape, label, samples
from bench.inputs import size_in_bytes as size
from bench.peers import calls, reference_peers, standard_normal
from fastdistill.diffusion import Noise
from fastdistill.ops import normal
from fastdistill.ops.noise import _normal


class Inputs(NamedTuple):
    """One set: the noise key and the samples' global indices."""

    key: Tensor
    sample: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    return (_case(shape, dtype, device) for shape, dtype in samples(device, small))


def _case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        sample = torch.arange(shape[0], device=device)
        return Inputs(Noise(generator.initial_seed(), device).key("bench"), sample)

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        return (*inputs, list(shape[1:]), dtype)

    def ours(*values: Any) -> Results:
        return (normal(*values),)

    def reference(*values: Any) -> Results:
        return (_normal.reference(*values),)

    def torch_noise(inputs: Inputs) -> Run:
        return lambda: (torch.randn(shape, dtype=dtype, device=device),)

    def judge(inputs: Inputs) -> Judge:
        exact = _normal.reference(*inputs, list(shape[1:]), torch.float64)
        return near((exact,), TOLERANCE[dtype])

    return Case(
        *("normal", label(shape), dtype, size(shape, dtype)),
        make=make,
        variants={
            OURS: calls(ours, arguments),
            "torch.randn": Variant(torch_noise, lambda _: lambda found: standard_normal(found[0])),
            **reference_peers(reference, arguments, device.type == "cuda"),
        },
        judge=judge,
    )
