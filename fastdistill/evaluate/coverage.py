"""Share of each class among samples: the plainest view of dropped modes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassShares(NamedTuple):
    """Result of `class_shares`."""

    shares: Tensor
    """Share of each class, summing to one  # [classes], float64"""
    smallest: float
    """Share of the rarest class; 0 where a class is missing"""
    largest: float
    """Share of the commonest class"""


def class_shares(labels: Tensor, classes: int) -> ClassShares:
    """Share of the samples that carry each label.

    Args:
        labels: integer labels [n] in [0, classes).
        classes: number of classes, which may be missing from the labels.

    Returns:
        The shares, on the labels' device, and the smallest and largest of them.

    Raises:
        ValueError: no labels, labels that are not integers [n], or a label outside [0, classes).
    """
    if classes < 1:
        raise ValueError(f"classes is {classes}; expected at least 1")
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.ndim != 1 or not integer or labels.numel() == 0:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected integers "
            "[n], n > 0"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels lie in {low}..{high}; expected 0..{classes - 1}")
    shares = torch.bincount(labels.long(), minlength=classes).double() / labels.numel()  # [classes]
    return ClassShares(shares, float(shares.min()), float(shares.max()))
