"""`TensorFiles`: tensors of one length, spread over safetensors files, read by rows."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor


class TensorFiles:
    """Tensors with one row a sample, by name, over files one after the other.

    Files are mapped into memory: opening reads headers alone, a row reads its own pages.
    Several threads may read at once.

    Args:
        files: safetensors files in the order of their samples.

    Attributes:
        shapes: shape of one row, by name.
        dtypes: storage dtype, by name.

    Raises:
        ValueError: for no file, and naming one that is missing, damaged, or unlike the first.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        if not files:
            raise ValueError("no safetensors file was given; expected at least one")
        self._parts = [_open(file) for file in files]
        lengths = [_length(file, part) for file, part in zip(files, self._parts, strict=True)]
        self._ends = list(itertools.accumulate(lengths))
        self.shapes = {name: tuple(value.shape[1:]) for name, value in self._parts[0].items()}
        self.dtypes = {name: value.dtype for name, value in self._parts[0].items()}
        for file, part in zip(files, self._parts, strict=True):
            kinds = {name: (value.dtype, tuple(value.shape[1:])) for name, value in part.items()}
            expected = {name: (self.dtypes[name], shape) for name, shape in self.shapes.items()}
            if kinds != expected:
                raise ValueError(
                    f"{file} holds {_list(kinds)}, but {files[0].name} holds {_list(expected)}"
                )

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, name: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Rows of a tensor, copied, in the storage dtype or another  # [len(rows), ...]"""
        out = torch.empty(len(rows), *self.shapes[name], dtype=dtype or self.dtypes[name])
        for position, row in enumerate(rows):
            part = bisect.bisect_right(self._ends, row)
            first = self._ends[part - 1] if part else 0
            out[position].copy_(self._parts[part][name][row - first])
        return out

    def whole(self, name: str) -> Tensor:
        """All rows, of a tensor that is small, as labels  # [n, ...]"""
        return torch.cat([part[name] for part in self._parts])


def _open(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, mapped and not read."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        with safe_open(file, "pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated, damaged or no safetensors file: {error}") from error


def _length(file: Path, part: dict[str, Tensor]) -> int:
    lengths = {len(value) if value.dim() else -1 for value in part.values()}
    if len(lengths) != 1 or min(lengths) < 1:
        shapes = {name: list(value.shape) for name, value in part.items()}
        raise ValueError(f"{file}: expected tensors with one row for each sample, found {shapes}")
    return lengths.pop()


def _list(kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(
        f"{name} {str(dtype).removeprefix('torch.')} {list(shape)}"
        for name, (dtype, shape) in sorted(kinds.items())
    )
