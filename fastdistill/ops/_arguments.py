"""Checks and broadcasts that every op shares: samples are [B, ...], coefficients are [B]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_STORAGE = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


class Coefficients(NamedTuple):
    """A parametrisation as two numbers a sample: D(x_t, t) = a * x_t + b * F, F raw output."""

    a: Tensor
    """Coefficient of x_t  # [B]"""
    b: Tensor
    """Coefficient of the raw network output  # [B]"""


def per_sample(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` [B] in ``dtype``, shaped to broadcast against ``like`` [B, ...]."""
    return value.to(dtype).reshape(-1, *[1] * (like.ndim - 1))


def elements_per_sample(value: Tensor) -> int:
    """Number of elements of one sample of [B, ...], also of an empty batch."""
    return value.shape[1:].numel()


def mean_over_sample(value: Tensor) -> Tensor:
    """Mean over all dimensions but the batch  # [B, ...] -> [B]"""
    return value.flatten(1).mean(dim=1)


class Layout(NamedTuple):
    """The order in which samples lie in memory: kernels see it as contiguous, without a copy.

    Elementwise and reducing ops do not care which element is which, so that channels-last networks
    get channels-last cotangents. Arguments in another layout are copied into that of the first.
    """

    order: tuple[int, ...] | None
    """Dimensions in the order of memory; None where that is their own."""

    @staticmethod
    def of(value: Tensor) -> Layout:
        """Layout of a batch: channels-last or, for everything else, contiguous."""
        if not value.is_contiguous():
            if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
                return Layout((0, 2, 3, 1))
            if value.ndim == 5 and value.is_contiguous(memory_format=torch.channels_last_3d):
                return Layout((0, 2, 3, 4, 1))
        return Layout(None)

    def pack(self, value: Tensor) -> Tensor:
        """``value`` as a contiguous tensor in this order."""
        return (value if self.order is None else value.permute(self.order)).contiguous()

    def pack_optional(self, value: Tensor | None) -> Tensor | None:
        """`pack`, where there is something to pack."""
        return None if value is None else self.pack(value)

    def unpack(self, value: Tensor) -> Tensor:
        """What `pack` took apart, in the dimensions' own order."""
        return value if self.order is None else value.movedim(-1, 1)


def check_floating(name: str, value: Tensor) -> None:
    """Raise ValueError unless ``value`` is stored in a dtype that ops take."""
    if value.dtype not in _STORAGE:
        raise ValueError(f"{name} is {value.dtype}; expected float32, bfloat16, float16 or float64")


def check_sample(name: str, value: Tensor) -> None:
    """Raise ValueError unless ``value`` is a floating-point batch [B, ...]."""
    if value.dtype not in _STORAGE or value.ndim < 2:
        raise ValueError(
            f"{name} is {value.dtype} of shape {tuple(value.shape)}; expected a batch [B, ...] in "
            "float32, bfloat16, float16 or float64"
        )


def check_scale(scale: float) -> None:
    """Raise ValueError unless the cotangent's factor is positive."""
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a positive number, as 1 / B")


def check_like(reference: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless each given tensor has the shape and device of ``reference``."""
    shape, device = reference.shape, reference.device
    for name, value in tensors.items():
        if value is None:
            continue
        if value.shape != shape or value.device != device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; expected "
                f"{tuple(shape)} on {device}, as x0 has"
            )
        check_sample(name, value)


def check_batch(reference: Tensor, **coefficients: Tensor | None) -> None:
    """Raise ValueError unless each given coefficient is [B] on the device of ``reference``."""
    shape, device = reference.shape[:1], reference.device
    for name, value in coefficients.items():
        if value is not None and (value.shape != shape or value.device != device):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; expected one number a "
                f"sample, shape ({shape[0]},), on {device}"
            )
