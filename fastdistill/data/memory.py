"""`InMemoryData`: a small data set, held on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.data.base import Order, RealBatch


class InMemoryData:
    """A data set held on the device, visited in a new order every epoch.

    Args:
        samples: all samples [n, ...], float32.
        labels: their classes, int64 [n], or None. The null condition is one class more.

    Raises:
        ValueError: for empty or non-finite data, or labels of another length.
    """

    def __init__(self, samples: Tensor, labels: Tensor | None = None) -> None:
        if len(samples) == 0:
            raise ValueError("the data set is empty; expected at least one sample")
        if not torch.isfinite(samples).all():
            broken = (~torch.isfinite(samples)).flatten(1).any(1).nonzero().flatten()
            raise ValueError(
                f"the data set has nan or infinite values in {len(broken)} of {len(samples)} "
                f"samples, the first at index {int(broken[0])}; remove or repair them"
            )
        if labels is not None and labels.shape != (len(samples),):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; expected ({len(samples)},), one a sample"
            )
        self.samples, self.labels = samples, labels
        self.classes = 0 if labels is None else int(labels.max()) + 1
        """Number of classes; 0 without labels."""
        self._order = Order(len(samples), samples.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.samples.shape[1:])

    def to(self, device: torch.device) -> InMemoryData:
        """The same data on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return InMemoryData(self.samples.to(device), labels)

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        rows = self._order.rows(seed, step, count)[share]
        if self.labels is None:
            return RealBatch(self.samples[rows])
        labels = self.labels[rows]
        return RealBatch(self.samples[rows], labels, torch.full_like(labels, self.classes))
