"""`Data`: what a trainer asks of a data set, and the order in which samples are visited.

A data set is a deterministic function of (seed, step): there is nothing to save, nothing to lose,
and every number of processes sees the same samples.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdistill.diffusion import Noise


class RealBatch(NamedTuple):
    """Samples and what they are conditioned on."""

    samples: Tensor | None
    """Real samples, float32 [B, ...]; None where there are conditions alone, as prompts."""
    condition: Any = None
    """What each sample is conditioned on: None, a tensor [B, ...] or a dict of them."""
    uncondition: Any = None
    """The null condition of the same structure, for guidance and condition dropout."""


class Data(Protocol):
    """A data set: batches as a function of (seed, step)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        """Samples ``step * count`` to ``(step + 1) * count`` of the endless shuffled sequence.

        Args:
            seed: seed of the order.
            step: number of the batch.
            count: samples of the whole batch, over all ranks.
            share: which of them are returned: this rank's.
        """


class Order:
    """The endless shuffled sequence of n samples: every epoch visits each once, in a new order.

    Several threads may ask at once.

    Args:
        size: number of samples.
        device: where the indices are made, and returned.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size, self.device = size, torch.device(device)
        self._epochs: dict[tuple[int, int], Tensor] = {}
        self._lock = threading.Lock()

    def rows(self, seed: int, step: int, count: int) -> Tensor:
        """Indices of samples ``step * count`` to ``(step + 1) * count``, int64 [count]."""
        first, chosen = step * count, []
        while count > 0:
            epoch, offset = divmod(first, self.size)
            taken = min(count, self.size - offset)
            chosen.append(self._epoch(seed, epoch)[offset : offset + taken])
            first, count = first + taken, count - taken
        return torch.cat(chosen)

    def _epoch(self, seed: int, epoch: int) -> Tensor:
        """The permutation of this epoch, from counter-based noise; the last two are kept."""
        key = (seed, epoch)
        with self._lock:
            if key not in self._epochs:
                index = torch.arange(self.size, device=self.device)
                draws = Noise(seed, self.device).at(epoch).uniform("data-order", index)
                while len(self._epochs) > 1:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[key] = torch.argsort(draws, stable=True)
            return self._epochs[key]
