"""Checks and broadcasts that every op shares: samples are [B, ...], coefficients are [B]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    for name, value in tensors.items():
        if value is None:
            continue
        check_sample(name, value)
        if value.shape != reference.shape or value.device != reference.device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; expected "
                f"{tuple(reference.shape)} on {reference.device}, as x0 has"
            )


def check_batch(reference: Tensor, **coefficients: Tensor | None) -> None:
    """Raise ValueError unless each given coefficient is [B] on the device of ``reference``."""
    for name, value in coefficients.items():
        if value is None:
            continue
        if value.shape != reference.shape[:1] or value.device != reference.device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; expected one number a "
                f"sample, shape ({reference.shape[0]},), on {reference.device}"
            )
