"""Metrics stay on the device between log points; `MetricBuffer` reads them in one transfer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.parallel.ranks import Ranks


class MetricBuffer:
    """Running means of named metrics, whole and by noise level, on the device.

    Args:
        device: where the sums live.
        bins: number of noise-level bins.
        ranks: processes over which means are taken, each adding its own samples.
    """

    def __init__(self, device: torch.device, bins: int, ranks: Ranks | None = None) -> None:
        self.device, self.bins = device, bins
        self.ranks = ranks or Ranks(device)
        self._sums: dict[str, Tensor] = {}

    def add(self, prefix: str, metrics: Mapping[str, Tensor]) -> None:
        """Add scalars, or one value a sample, under ``prefix/name``."""
        for name, value in metrics.items():
            total = self._sum(f"{prefix}/{name}", 1)
            total[0, 0] += value.detach().sum()
            total[0, 1] += value.numel()

    def add_by_level(self, prefix: str, metrics: Mapping[str, Tensor], noise_bin: Tensor) -> None:
        """Add one value a sample [B] to the sums of each sample's noise-level bin [B]."""
        for name, value in metrics.items():
            seen = torch.stack((value.detach().float(), torch.ones_like(value).float()), dim=1)
            self._sum(f"{prefix}/{name}/by_level", self.bins).index_add_(0, noise_bin, seen)

    def read(self) -> dict[str, float | list[float | None]]:
        """Means since the last call, in one transfer to the host, and start anew.

        Bins that saw nothing are None.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)  # the order in which they first came would not survive a resume
        sums = torch.cat([self._sums[name] for name in names])
        self.ranks.sum_(sums)
        values = iter(sums.tolist())
        means: dict[str, float | list[float | None]] = {}
        for name in names:
            total = self._sums[name]
            row = [_mean(*next(values)) for _ in range(total.shape[0])]
            if name.endswith("/by_level"):
                means[name] = row
            elif row[0] is not None:
                means[name] = row[0]
            total.zero_()
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of all ranks by name."""
        state = {name: self._sums[name].clone() for name in sorted(self._sums)}
        for value in state.values():
            self.ranks.sum_(value)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over sums that `state_dict` gave; the first rank keeps them for all."""
        self._sums = {name: value.to(self.device, copy=True) for name, value in state.items()}
        if not self.ranks.is_first:
            for value in self._sums.values():
                value.zero_()

    def _sum(self, name: str, rows: int) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros(rows, 2, device=self.device)
        return self._sums[name]


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


class JSONLines:
    """An append-only file of JSON rows that can be cut back to a checkpoint's length.

    Args:
        path: the file; made if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; nan and infinity become null, which JSON can say."""
        text = json.dumps(finite(row), separators=(",", ":"), allow_nan=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def commit(self) -> int:
        """Force what was written to the disk, and return the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, length: int) -> None:
        """Drop everything after ``length`` bytes, as written after the checkpoint resumed from.

        Raises:
            ValueError: if the file is shorter than that.
        """
        self._file.flush()
        size = self.path.stat().st_size
        if size < length:
            raise ValueError(
                f"{self.path} has {size} bytes, but the checkpoint was made at {length}; the file "
                "was cut or replaced, restore it or start another run"
            )
        self._file.truncate(length)
        self._file.seek(length)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def finite(value: Any) -> Any:
    """The same numbers with None in the place of nan and infinity, which JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
