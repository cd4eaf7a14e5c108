"""Checks that the metrics share: a metric of broken samples is an error, never a number."""

from __future__ import annotations

import torch
from torch import Tensor


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError, with the count, unless every element of ``values`` [n, ...] is finite."""
    finite = torch.isfinite(values)
    if not finite.all():
        rows = int((~finite).flatten(1).any(1).sum())
        raise ValueError(
            f"{name}: {int((~finite).sum())} of {values.numel()} elements are not finite, in "
            f"{rows} of {values.shape[0]} samples"
        )


def check_features(name: str, features: Tensor, rows: int) -> None:
    """Raise ValueError unless ``features`` is finite floating [n, d] with n >= rows and d >= 1."""
    if features.ndim != 2 or not features.is_floating_point() or features.shape[1] == 0:
        raise ValueError(
            f"{name} is {features.dtype} of shape {tuple(features.shape)}; expected floating-point "
            "features [n, d]"
        )
    if features.shape[0] < rows:
        raise ValueError(f"{name} has {features.shape[0]} samples; at least {rows} are needed")
    check_finite(name, features)


def check_same_width(a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless two feature tensors [n, d] and [m, d] have the same d."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} and {b.shape[1]} dimensions; expected equal")


def random_rows(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` distinct rows of ``values`` [n, ...], drawn by a generator on the CPU."""
    order = torch.randperm(values.shape[0], generator=generator, device="cpu")
    return values[order[:count].to(values.device)]
