"""Sizes and random inputs that the cases share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Most relative error of a right result; chains that round to bfloat16 in between need the room."""

_SMALL: list[Shape] = [(2, 3, 8, 8)]
_CPU: list[Shape] = [(256, 3, 64, 64), (64, 3, 64, 64), (8, 4, 128, 128)]
_CUDA: list[Shape] = [(256, 4, 128, 128), (8, 4, 128, 128)]


def samples(device: torch.device, small: bool) -> Iterator[tuple[Shape, torch.dtype]]:
    """Batches of samples, the largest first, in both dtypes.

    The largest are bound by bandwidth: a set of inputs is as large as a CPU's cache or larger, and
    on a GPU 64 MiB and more are moved. The last are one batch of SDXL's latents, where a GPU spends
    most of its time waiting for launches.
    """
    shapes = _SMALL if small else _CUDA if device.type == "cuda" else _CPU
    return ((shape, dtype) for dtype in TOLERANCE for shape in shapes)


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def draw_long(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal numbers that repeat after 2^20, since long tensors take long to draw."""
    block = draw((min(count, 2**20),), dtype, generator)
    return block.repeat(math.ceil(count / len(block)))[:count].contiguous()


def noise_level(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of each sample, variance preserving, float64 as schedules hold them  # [B]"""
    sigma = torch.linspace(0.3, 0.9, batch, dtype=torch.float64, device=device)
    return (1 - sigma.square()).sqrt(), sigma


def label(shape: Shape) -> str:
    """The shape as tables show it."""
    return "x".join(map(str, shape))


def size_in_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def in_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a reference with floating-point tensors and dtypes in float64."""
    return tuple(_in_float64(value) for value in arguments)


def _in_float64(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) else value
