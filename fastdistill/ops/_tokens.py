"""Checks and broadcasts that the ops on tokens share: tokens are [B, T, C], channels [B, C]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops._arguments import check_floating


def wide(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` [B, C] or [C] in ``dtype``, shaped to broadcast against tokens [B, T, C]."""
    return value.to(dtype).unsqueeze(-2) if value.ndim == 2 else value.to(dtype)


def dense_channels(value: Tensor) -> Tensor:
    """``value`` [B, C] or [C] with its channels side by side; samples may lie apart."""
    return value if value.stride(-1) == 1 else value.contiguous()


def check_tokens(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """Raise ValueError unless ``value`` is [B, T, C], and as ``like`` where that is given."""
    check_floating(name, value)
    if like is None and value.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected tokens [B, T, C]")
    if like is not None and (value.shape != like.shape or value.device != like.device):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} on {value.device}; expected "
            f"{tuple(like.shape)} on {like.device}, as x has"
        )


def check_channels(name: str, value: Tensor, like: Tensor, samples: bool) -> None:
    """Raise ValueError unless ``value`` is [B, C] (or [C]) beside tokens ``like`` [B, T, C]."""
    check_floating(name, value)
    wanted = (like.shape[0], like.shape[2]) if samples else (like.shape[2],)
    if value.shape != wanted or value.device != like.device:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} on {value.device}; expected {wanted} on "
            f"{like.device}"
        )
