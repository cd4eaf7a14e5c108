"""`Layout`: the place of every parameter of a network in one flat range, the same in every role.

A role is what is as large as the parameters: float32 master weights, gradients, both moments, every
moving average, the low-precision copy. Each is one tensor of `Layout.size` elements on each rank,
and a parameter has the same offset in all of them, so that one kernel walks all roles at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter as the planner sees it."""

    names: tuple[str, ...]
    """Its canonical name, then the names of parameters that are tied to it."""
    shape: tuple[int, ...]
    unit: int = 0
    """The unit that it is gathered with; units ascend in forward order."""
    group: int = 0
    """Its learning-rate and weight-decay group."""
    order: tuple[int, ...] | None = None
    """Dims from the slowest to the fastest in memory; None is row-major, (0, 2, 3, 1) makes
    channels-last a view."""


class Shard(NamedTuple):
    """What one rank owns of a parameter, and where it lies in the rank's range."""

    first_row: int
    """First row of dim 0; the number of rows where the rank owns none."""
    rows: int
    """Rows of dim 0; a scalar is one row."""
    offset: int
    """First element in the range."""
    numel: int
    """Elements, without padding."""


class Layout:
    """Where each parameter lies in the flat range that a rank holds of each role.

    Units follow each other in ascending order; in a unit the groups ascend, so that each is one
    contiguous sub-range; in a group the parameters keep the order in which they are given.

    With ``shards`` ranks every parameter is cut on dim 0 as FSDP2 does it: ceil(rows / shards) rows
    to each rank in turn, the last ones getting fewer or none, and every rank reserves the most
    that one gets. Offsets are therefore the same on all ranks.

    Args:
        entries: the parameters in forward order, tied ones once.
        shards: number of ranks that hold the network together.
        alignment: elements, a power of two; every parameter starts at a multiple, and the range's
            size is one. 256 aligns roles of one byte an element and more to 256 bytes.
        packed: align only the start of each unit, and let parameters follow each other without
            gaps inside: a unit is then what FSDP2's reduce-scatter writes.

    Raises:
        ValueError: for entries that no range can hold, and for arguments out of range.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        shards: int = 1,
        alignment: int = 256,
        packed: bool = False,
    ) -> None:
        self.entries = tuple(entries)
        """The parameters as they were given."""
        self.shards, self.alignment, self.packed = shards, alignment, packed
        _check_arguments(self.entries, shards, alignment)
        for entry in self.entries:
            _check_entry(entry, shards)
        self._index = _index_by_name(self.entries)
        parameters = [(*_matrix(entry), entry.unit, entry.group) for entry in self.entries]
        rows, offsets, size = _plan(parameters, shards, alignment, packed)
        self.size: int = size
        """Elements of one rank's range, a multiple of the alignment."""
        self._rows: list[int] = rows
        self._offsets: list[int] = offsets
        self._padded = [rows * row for rows, (_, row, *_) in zip(rows, parameters, strict=True)]
        spans = self._spans()
        self._units = {unit: place for place, unit in enumerate(sorted(spans))}
        self.units = [spans[unit] for unit in sorted(spans)]
        """(start, end) of each unit's elements, ascending; the end is that of its last parameter
        with FSDP2's padding, but without what aligns the next unit."""

    @property
    def parameters(self) -> int:
        """Elements of the whole network, over all ranks and without padding."""
        return sum(math.prod(entry.shape) for entry in self.entries)

    def offset(self, name: str) -> int:
        """First element of a parameter, by any of its names."""
        return self._offsets[self._find(name)]

    def unit_of(self, name: str) -> int:
        """Place in `units` of the unit that holds a parameter, by any of its names.

        It is the entry's own number where these count from 0 without gaps.
        """
        return self._units[self.entries[self._find(name)].unit]

    def padded(self, name: str) -> int:
        """Elements that every rank reserves for a parameter."""
        return self._padded[self._find(name)]

    def shard(self, name: str, rank: int) -> Shard:
        """What ``rank`` owns of a parameter.

        Raises:
            ValueError: for a name or rank that there is not.
        """
        index = self._find(name)
        self._check_rank(rank)
        return self._shard(index, rank)

    def owned(self, rank: int) -> int:
        """Elements of parameters in one rank's range, without padding."""
        self._check_rank(rank)
        return sum(self._shard(index, rank).numel for index in range(len(self.entries)))

    def ranges(self) -> tuple[list[int], list[int]]:
        """The range as runs of one group each, for an update that has a learning rate for each.

        A run goes on through padding, and through the next unit if that has the same group.

        Returns:
            The first element of each run, ascending from 0, and the run's group.
        """
        filled = zip(self._offsets, self._padded, self.entries, strict=True)
        places = sorted((offset, entry.group) for offset, size, entry in filled if size > 0)
        starts, groups = [0], [places[0][1] if places else self.entries[0].group]
        for offset, group in places:
            if group != groups[-1]:
                starts.append(offset)
                groups.append(group)
        return starts, groups

    def bytes_per_rank(self, roles: Mapping[str, torch.dtype]) -> dict[str, int]:
        """Bytes that each role takes on one rank, from its dtype."""
        return {role: self.size * dtype.itemsize for role, dtype in roles.items()}

    def _spans(self) -> dict[int, tuple[int, int]]:
        """First element and end of each unit, by the entries' numbers."""
        spans: dict[int, tuple[int, int]] = {}
        for entry, offset, padded in zip(self.entries, self._offsets, self._padded, strict=True):
            start, end = spans.get(entry.unit, (offset, offset))
            spans[entry.unit] = min(start, offset), max(end, offset + padded)
        return spans

    def _shard(self, index: int, rank: int) -> Shard:
        rows, row_size = _matrix(self.entries[index])
        first = min(rank * self._rows[index], rows)
        owned = min(self._rows[index], rows - first)
        return Shard(first, owned, self._offsets[index], owned * row_size)

    def _find(self, name: str) -> int:
        if name not in self._index:
            raise ValueError(f"there is no parameter {name!r} among the {len(self.entries)} here")
        return self._index[name]

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.shards:
            raise ValueError(f"rank is {rank}; expected one of the {self.shards} from 0")


def _matrix(entry: Entry) -> tuple[int, int]:
    """Rows of dim 0 and elements of one; a scalar is one row."""
    shape = entry.shape or (1,)
    return shape[0], math.prod(shape[1:])


def _index_by_name(entries: Sequence[Entry]) -> dict[str, int]:
    index: dict[str, int] = {}
    for place, entry in enumerate(entries):
        for name in entry.names:
            if name in index:
                raise ValueError(
                    f"{name!r} names two parameters; a tied parameter is one entry with both names"
                )
            index[name] = place
    return index


def _check_arguments(entries: Sequence[Entry], shards: int, alignment: int) -> None:
    if not entries:
        raise ValueError("entries is empty; expected a network's parameters, at least one")
    if shards < 1:
        raise ValueError(f"shards is {shards}; expected the number of ranks, 1 without sharding")
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment is {alignment} elements; expected a power of two, as 256")
    elements = sum(math.prod(entry.shape) + alignment for entry in entries) + alignment
    if elements >= 2**63:
        raise ValueError(f"the range would have up to {elements} elements; expected below 2^63")


def _check_entry(entry: Entry, shards: int) -> None:
    if not entry.names:
        raise ValueError(f"a parameter of shape {entry.shape} has no name; expected one or more")
    what = f"{entry.names[0]!r} has shape {entry.shape}"
    if any(size < 0 for size in entry.shape):
        raise ValueError(f"{what}; expected no negative sizes")
    if shards > 1 and not entry.shape:
        raise ValueError(f"{what}, which has no dim 0 to shard; reshape the parameter to (1,)")
    if entry.order is None:
        return
    if sorted(entry.order) != list(range(len(entry.shape))):
        raise ValueError(f"{what} and order {entry.order}; expected each dim once")
    if shards > 1 and entry.order[0] != 0:
        raise ValueError(
            f"{what} and order {entry.order}, in which rows are not contiguous; sharding on dim 0 "
            "needs an order that starts with 0"
        )


def _plan_reference(
    parameters: Sequence[tuple[int, int, int, int]], shards: int, alignment: int, packed: bool
) -> tuple[list[int], list[int], int]:
    """What ``csrc/arena/layout.cpp`` computes, where it is not built.

    Args:
        parameters: (rows, elements of a row, unit, group) of each.
        shards: number of ranks.
        alignment: elements.
        packed: whether only units are aligned.

    Returns:
        Rows of each parameter on every rank, padding included; offsets; size of the range.
    """
    rows = [-(-count // shards) for count, *_ in parameters]
    offsets = [0] * len(parameters)
    end, previous = 0, None
    for index in sorted(range(len(parameters)), key=lambda i: parameters[i][2:]):
        _, row_size, unit, _ = parameters[index]
        if not packed or unit != previous:
            end = -(-end // alignment) * alignment
        offsets[index] = end
        end += rows[index] * row_size
        previous = unit
    return rows, offsets, -(-end // alignment) * alignment


try:
    from fastdistill._arena import plan as _plan
except ImportError:
    _plan = _plan_reference
