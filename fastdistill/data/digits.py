"""The UCI digits: 1,797 real images, small enough for a laptop."""

from __future__ import annotations

import torch

from fastdistill.data.memory import InMemoryData


def digits() -> InMemoryData:
    """The UCI digits of scikit-learn: 1,797 real images of 8x8 in ten classes, in [-1, 1]."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 8 - 1
    return InMemoryData(images, torch.from_numpy(raw.target).long())
