"""Shards: the part of the tensors that one rank writes, and tensors put together from all parts.

Tensors are named ``group/name`` and lie in one file a rank, in the layout of the safetensors
storage of torch.distributed.checkpoint, whose planner and reader put them together for any other
mesh. Its writer is not used: it makes a second copy of all that a rank writes in memory, and sends
every rank's plan to rank 0, though who writes what follows from the placements alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Shard

from fastdistill.engine.folder import write_tensors
from fastdistill.parallel import Ranks

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by group."""


class Piece(NamedTuple):
    """What one rank holds of a tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]
    """Where it begins in the whole, in each dimension."""


def own_pieces(tensors: Tensors, ranks: Ranks) -> dict[str, Piece]:
    """What this rank writes, by ``group/name``; of equal pieces one rank writes one.

    Args:
        tensors: DTensors, or plain tensors that are the same on all ranks; the same names on all.
        ranks: the processes of the run.

    Raises:
        ValueError: for a DTensor with another placement than Shard and Replicate.
    """
    written: dict[int, list[int]] = {}  # bytes by replica, for each number of replicas
    pieces = {}
    for key, tensor in _flat(tensors).items():
        replica, replicas = _replica(key, tensor, ranks)
        load = written.setdefault(replicas, [0] * replicas)
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if replica == writer:
            piece = _piece(tensor)
            if piece.tensor.numel() or not tensor.numel():  # a rank may own no rows
                pieces[key] = piece
    return pieces


class HostCopy:
    """Host memory for pieces, allocated once: page-locked for those of a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Copies of the pieces as they are now, which stand until the next call."""
        on_gpu = any(piece.tensor.is_cuda for piece in pieces.values())
        self._buffers = {key: self._buffer(key, piece.tensor) for key, piece in pieces.items()}
        for key, piece in pieces.items():
            self._buffers[key].copy_(piece.tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return {key: Piece(self._buffers[key], piece.offsets) for key, piece in pieces.items()}

    def _buffer(self, key: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (like.shape, like.dtype):
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return buffer


def write_shard(
    folder: Path, pieces: Mapping[str, Piece], ranks: Ranks
) -> tuple[str, dict[str, Any]]:
    """Write this rank's file and force it to the disk; its name and entry in the manifest."""
    file = folder / f"shard-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"
    layout = {key: {"saved_offsets": piece.offsets} for key, piece in sorted(pieces.items())}
    tensors = {key: piece.tensor for key, piece in pieces.items()}
    return file.name, write_tensors(file, tensors, {"DCP_SHARDING_INFO": json.dumps(layout)})


def load_(path: Path, tensors: Tensors) -> None:
    """Fill tensors from a verified checkpoint, whatever mesh and number of ranks saved it.

    Every rank reads what it owns; nothing is said between ranks.

    Args:
        path: the checkpoint.
        tensors: plain tensors or DTensors, filled in place; a group that is not given is not read.

    Raises:
        ValueError: where names, shapes or dtypes of a group are not those of the checkpoint.
    """
    reader = HuggingFaceStorageReader(str(path))
    metadata = reader.read_metadata()
    _check_fit(path, tensors, metadata.state_dict_metadata)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(_flat(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner)


def read_tensors(path: Path, group: str) -> dict[str, Tensor]:
    """Whole tensors of one group of a committed folder or checkpoint; none if it has no such."""
    file = path / f"{group}.safetensors"
    if file.is_file():
        return load_file(file)
    saved: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {
        key.removeprefix(f"{group}/"): torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in saved.items()
        if key.startswith(f"{group}/")
    }
    load_(path, {group: tensors})
    return tensors


def _flat(tensors: Tensors) -> dict[str, Tensor]:
    for group in tensors:
        if "/" in group:
            raise ValueError(f"group {group!r} of a checkpoint has a slash in its name")
    return {f"{group}/{name}": value for group in tensors for name, value in tensors[group].items()}


def _replica(key: str, tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """Which of how many equal pieces this rank holds; -1 where it holds none."""
    if not isinstance(tensor, DTensor):
        return ranks.rank, ranks.size
    mesh, replica, replicas = tensor.device_mesh, 0, 1
    coordinate = mesh.get_coordinate()
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            replicas *= mesh.size(dimension)
            replica = replica * mesh.size(dimension) + (coordinate or [0] * mesh.ndim)[dimension]
        elif type(placement) is not Shard:
            raise ValueError(f"{key} is placed as {placement!r}; expected Shard or Replicate")
    return (-1 if coordinate is None else replica), replicas


def _piece(tensor: Tensor) -> Piece:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Piece(tensor, (0,) * tensor.dim())
    [chunk] = tensor.__create_chunk_list__()
    return Piece(tensor.to_local(), tuple(chunk.offsets))


def _check_fit(path: Path, tensors: Tensors, saved: Mapping[str, Any]) -> None:
    flat = _flat(tensors)
    problems = {
        "missing": [key for key in flat if key not in saved],
        "unknown": [key for key in saved if key.split("/")[0] in tensors and key not in flat],
        "different": [
            f"{key} (saved {entry.properties.dtype} {list(entry.size)}, "
            f"here {flat[key].dtype} {list(flat[key].shape)})"
            for key, entry in saved.items()
            if key in flat
            and (entry.properties.dtype, entry.size) != (flat[key].dtype, flat[key].shape)
        ],
    }
    found = [f"{kind}: {_first_few(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{path} does not fit what it is loaded into; {'; '.join(found)}")


def _first_few(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(sorted(names)[:count]) + more
