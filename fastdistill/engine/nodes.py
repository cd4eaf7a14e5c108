"""The nodes of a degradation path in a run's folder: ``nodes/000`` is the teacher.

Each is a folder with weights (safetensors), what they are (JSON) and checksums, whole or absent.
The teacher's is whole; the others hold all weights too, or the differences from the teacher's as
factors of low rank. Nothing is loaded that does not fit name by name: a node that silently filled
nothing would leave the teacher as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdistill.engine.folder import check_folder, commit_folder, read_document
from fastdistill.engine.shards import read_tensors

_OVERSAMPLING, _ITERATIONS = 8, 4
"""Of the randomised singular value decomposition."""


class Delta(NamedTuple):
    """Differences from the teacher, weight by weight."""

    tensors: dict[str, Tensor]
    """``name.left`` [m, r] and ``name.right`` [r, n], or ``name.delta`` where these are larger."""
    kept: float
    """Share of the differences' squared norm that is in them."""


class NodeFolder:
    """Nodes 0 ... ``last`` of a path.

    Args:
        folder: where they lie.
        last: number of the last node.
        rank: rank of the differences that are kept of each; None keeps whole weights.
    """

    def __init__(self, folder: Path, last: int, rank: int | None = None) -> None:
        self.folder, self._last, self.rank = folder, last, rank
        self._checked: set[int] = set()

    @property
    def last(self) -> int:
        """Number of the last node."""
        return self._last

    def save(self, number: int, weights: Mapping[str, Tensor], say: Callable[[str], None]) -> None:
        """Keep a node.

        Args:
            number: 0 for the teacher, which comes first.
            weights: state dict of its network, whole.
            say: called with one line.
        """
        document: dict[str, Any] = {"number": number, "rank": None}
        tensors, said = dict(weights), ""
        if number and self.rank is not None:
            delta = low_rank(self._read(0), weights, self.rank)
            document["rank"], tensors = self.rank, delta.tensors
            said = f": rank {self.rank} keeps {delta.kept:.1%} of its distance to the teacher"
        commit_folder(self._path(number), {"model": tensors}, {"node": document})
        self._checked.discard(number)
        say(f"node {number} of {self.last} kept{said}")

    @torch.no_grad()
    def load_(self, number: int, network: nn.Module) -> None:
        """Write a node's weights into a network of its kind, in place and in its dtypes.

        Raises:
            DamagedFolderError: for a node that is missing, cut or altered.
            ValueError: for one of another network, naming what does not fit.
        """
        weights, own = self.weights(number), network.state_dict(keep_vars=True)
        _check_fit(self._path(number), weights, own)
        for name, value in own.items():
            value.copy_(weights[name])

    def weights(self, number: int) -> dict[str, Tensor]:
        """State dict of a node, on the CPU; of low-rank differences, put together again."""
        tensors, rank = self._read(number), self._document(number)["rank"]
        if rank is None:
            return tensors
        base = self._read(0)
        foreign = {name.rpartition(".")[0] for name in tensors} - set(base)
        if foreign:
            raise ValueError(
                f"{self._path(number)} is a node of another network: the teacher has no "
                f"{min(foreign)}"
            )
        return {name: apply_delta(name, value, tensors) for name, value in base.items()}

    def _read(self, number: int) -> dict[str, Tensor]:
        path = self._path(number)
        if number not in self._checked:
            check_folder(path)
            self._checked.add(number)
        return read_tensors(path, "model")

    def _document(self, number: int) -> dict[str, Any]:
        document = read_document(self._path(number), "node")
        if document["number"] != number:
            raise ValueError(f"{self._path(number)} is node {document['number']}: it was moved")
        return document

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:03d}"


@torch.no_grad()
def low_rank(base: Mapping[str, Tensor], weights: Mapping[str, Tensor], rank: int) -> Delta:
    """Differences of two state dicts as factors of a rank.

    A weight of two and more dimensions is a matrix of its first by its others; what would not be
    smaller as factors is kept whole. Signs and bases are those of a fixed seed.
    """
    tensors: dict[str, Tensor] = {}
    total = missing = 0.0
    for name, value in weights.items():
        delta = value.float() - base[name].float()
        rows = delta.shape[0] if delta.ndim else 1
        columns = delta.numel() // max(rows, 1)
        if delta.ndim < 2 or rank * (rows + columns) >= rows * columns:
            tensors[f"{name}.delta"] = delta
        else:
            left, right = _factors(delta.reshape(rows, columns), rank)
            tensors |= {f"{name}.left": left, f"{name}.right": right}
            missing += float((delta.reshape(rows, columns) - left @ right).square().sum())
        total += float(delta.square().sum())
    return Delta(tensors, 1 - missing / total if total else 1.0)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left [m, r] and right [r, n] of the largest singular values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = min(rank + _OVERSAMPLING, *matrix.shape)
        left, values, right = torch.svd_lowrank(matrix, wanted, _ITERATIONS)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, (right[:, :rank] * root).T


def apply_delta(name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A weight of the teacher plus its difference.

    Raises:
        ValueError: where the differences have none for it, or one of another shape.
    """
    if f"{name}.delta" in tensors:
        delta = tensors[f"{name}.delta"]
    elif {f"{name}.left", f"{name}.right"} <= set(tensors):
        delta = tensors[f"{name}.left"] @ tensors[f"{name}.right"]
    else:
        raise ValueError(f"a node has no difference for {name}; it is of another network")
    if delta.numel() != base.numel():
        raise ValueError(f"a node's difference for {name} has {delta.numel()} elements")
    return (base.float() + delta.reshape(base.shape)).to(base.dtype)


def _check_fit(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    other = [
        f"{name} is {list(saved[name].shape)}, here {list(value.shape)}"
        for name, value in own.items()
        if name in saved and saved[name].shape != value.shape
    ]
    for kind, names in (("lacks", missing), ("has besides", unknown), ("differs", other)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{path} is a node of another network: it {kind} {names[0]}{more}")
