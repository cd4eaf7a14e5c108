"""`Moments`: count, mean and second moment of a stream of vectors, exact or sketched, in float64.

Centred sums are merged by Chan, Golub and LeVeque's update (1983, equation 1.5), which does not
cancel where the mean is large beside the deviation, and which makes the result one of the samples
alone: of any order, any batches and any number of ranks, to rounding.

Exact moments hold S = sum (x - mu)(x - mu)^T, d^2 numbers. A sketch holds Y = S Omega for a fixed
random Omega [d, k] instead: it is linear in S, and so merges in the same way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_BYTES = 2**27
_COLUMN_BLOCKS = 8


class Moments:
    """Moments of vectors [n, d], added in batches of any size.

    Args:
        dimensions: d.
        sketch: Omega [d, k] of a sketch; exact if None.
    """

    def __init__(self, dimensions: int, sketch: Tensor | None = None) -> None:
        self.count = 0
        self.trace = 0.0
        """Sum of squared distances from the mean: the trace of S, exact for sketches too."""
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self.sketch = sketch
        columns = dimensions if sketch is None else sketch.shape[1]
        self.second = torch.zeros(dimensions, columns, dtype=torch.float64)
        """S (its upper triangle until `complete`), or Y."""
        self._waiting: list[Tensor] = []
        self._rows = 0
        self._chunk = max(1, _CHUNK_BYTES // (8 * dimensions))

    def add(self, rows: Tensor) -> None:
        """Add vectors [n, d]; they may wait for others, so that products are of many rows."""
        for part in rows.split(self._chunk):
            self._waiting.append(part.to("cpu", torch.float64, copy=True))
            self._rows += len(part)
            if self._rows >= self._chunk:
                self.flush()

    def flush(self) -> None:
        """Bring in what waits."""
        if self._rows == 0:
            return
        rows = torch.cat(self._waiting)
        self._waiting, self._rows = [], 0
        mean = rows.mean(0)
        rows -= mean
        total = self.count + len(rows)
        step = mean - self.mean
        # The shift between the means is one more row.
        between = step * (self.count * len(rows) / total) ** 0.5
        rows = torch.cat((rows, between[None]))
        self.trace += float(rows.square().sum())
        self.mean += step * (len(rows) - 1) / total
        self.count = total
        self._multiply(rows)

    def _multiply(self, rows: Tensor) -> None:
        """S += rows^T rows, of which the upper triangle, or Y += rows^T (rows Omega)."""
        if self.sketch is not None:
            self.second.addmm_(rows.T, rows @ self.sketch)
            return
        width = -(-len(self.mean) // _COLUMN_BLOCKS)
        for first in range(0, len(self.mean), width):
            block = self.second[first : first + width, first:]
            block.addmm_(rows[:, first : first + width].T, rows[:, first:])

    def merge(self, other: Moments) -> None:
        """Add the vectors of another stream, which had the same sketch."""
        self.flush()
        other.flush()
        total = self.count + other.count
        if other.count == 0:
            return
        step = other.mean - self.mean
        self.second += other.second
        self.trace += other.trace
        between = (step * (self.count * other.count / total) ** 0.5)[None]
        self._multiply(between)
        self.trace += float(between.square().sum())
        self.mean += step * (other.count / total)
        self.count = total

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the vectors of all ranks of a group of CPUs (gloo); every rank has the sum then."""
        self.flush()
        counts = torch.tensor(float(self.count), dtype=torch.float64)
        dist.all_reduce(counts, group=group)
        mean = self.mean * self.count
        dist.all_reduce(mean, group=group)
        mean /= counts.clamp(min=1)
        between = ((self.mean - mean) * self.count**0.5)[None]
        self._multiply(between)
        trace = torch.tensor(self.trace, dtype=torch.float64) + between.square().sum()
        dist.all_reduce(trace, group=group)
        dist.all_reduce(self.second, group=group)
        self.count, self.mean, self.trace = int(counts), mean, float(trace)

    def complete(self) -> Tensor:
        """S whole [d, d], or Y [d, k]; the moments are used up by it."""
        self.flush()
        if self.sketch is None:
            width = -(-len(self.mean) // _COLUMN_BLOCKS)
            for first in range(0, len(self.mean), width):
                last = first + width
                self.second[last:, first:last] = self.second[first:last, last:].T
        return self.second
