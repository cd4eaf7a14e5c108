"""Data sets as deterministic functions of (seed, step): nothing to save, nothing to lose."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastdistill.diffusion import Noise


@dataclasses.dataclass(frozen=True)
class RealBatch:
    """Real samples and their conditions."""

    samples: Tensor
    """[B, ...] in [-1, 1]"""
    labels: Tensor | None
    """int64 [B], or None for unlabelled data."""


class InMemoryData:
    """A data set held on the device, visited in a new order every epoch.

    Args:
        samples: all samples [n, ...], float32.
        labels: their classes, int64 [n], or None.

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
        self._orders: dict[int, Tensor] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.samples.shape[1:])

    def to(self, device: torch.device) -> InMemoryData:
        """The same data on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return InMemoryData(self.samples.to(device), labels)

    def batch(self, seed: int, step: int, count: int) -> RealBatch:
        """Samples ``step * count`` to ``(step + 1) * count`` of the endless shuffled sequence."""
        n, first = len(self.samples), step * count
        chosen = []
        while count > 0:
            epoch, offset = divmod(first, n)
            taken = min(count, n - offset)
            chosen.append(self._order(seed, epoch)[offset : offset + taken])
            first, count = first + taken, count - taken
        rows = torch.cat(chosen)
        labels = None if self.labels is None else self.labels[rows]
        return RealBatch(self.samples[rows], labels)

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The permutation of this epoch, from counter-based noise; the last two are kept."""
        if epoch not in self._orders:
            device = self.samples.device
            index = torch.arange(len(self.samples), device=device)
            keys = Noise(seed, device).at(epoch).uniform("data-order", index)
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = torch.argsort(keys, stable=True)
        return self._orders[epoch]


def digits() -> InMemoryData:
    """The UCI digits of scikit-learn: 1,797 real images of 8x8 in ten classes, in [-1, 1]."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 8 - 1
    return InMemoryData(images, torch.from_numpy(raw.target).long())


DATA_SETS = {"digits": digits}
