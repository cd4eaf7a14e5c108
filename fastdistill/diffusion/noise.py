"""`Noise`: the seed, the step and the named streams behind every random number of a run."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops import normal, uniform
from fastdistill.ops.noise import philox_4x32


class Noise:
    """Random numbers as a pure function of (seed, stream, step, sample index, element).

    The keys live on the device and the step is written into them in place, so that a step neither
    waits for the host nor needs re-capturing in a CUDA graph; there is no state to save beyond the
    seed and the step. Streams are names, told apart by their CRC-32.

    Args:
        seed: any 64-bit integer.
        device: where samples are drawn.
    """

    _MOST_STREAMS = 64

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.step = 0
        self._table = torch.zeros(self._MOST_STREAMS, 3, dtype=torch.int64, device=device)
        self._table[:, 0] = _signed(seed)
        self._rows: dict[str, int] = {}

    def at(self, step: int) -> Noise:
        """Move every stream to ``step``, and return self."""
        self.step = step
        self._table[:, 2].fill_(step)
        return self

    def key(self, stream: str) -> Tensor:
        """The (seed, stream, step) key of a stream, int64 [3], a view that `at` keeps up to date.

        Raises:
            ValueError: for more different streams than the table holds.
        """
        row = self._rows.get(stream)
        if row is None:
            row = len(self._rows)
            if row == self._MOST_STREAMS:
                raise ValueError(f"stream {stream!r} is one more than {self._MOST_STREAMS}")
            self._rows[stream] = row
            self._table[row, 1].fill_(zlib.crc32(stream.encode()))
        return self._table[row]

    def normal(
        self,
        stream: str,
        sample: Tensor,
        shape: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Standard normal noise of the samples with these global indices  # [B, *shape]"""
        return normal(self.key(stream), sample, shape, dtype)

    def uniform(self, stream: str, sample: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers strictly inside (0, 1), float32  # [B, *shape]"""
        return uniform(self.key(stream), sample, shape)

    def choice(self, stream: str, count: int) -> int:
        """One number below ``count`` for the whole step, drawn on the host: it steers control flow.

        The same on every rank, as it depends on the seed, the stream and the step alone.
        """
        mask, key = 0xFFFFFFFF, (self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF)
        counter = (0, 0, self.step & mask, zlib.crc32(stream.encode()))
        return philox_4x32(counter, key)[0] * count >> 32


def _signed(seed: int) -> int:
    """The int64 with the bits of an unsigned 64-bit seed."""
    return seed - 2**64 if seed >= 2**63 else seed
