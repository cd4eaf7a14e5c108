"""What a network will take on each rank, before anything of it is allocated.

A network on the meta device is planned by the functions that lay out the real one, so that the
arena's part is what `fastdistill.optim.Arena.bytes` says afterwards. Every rank takes the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fastdistill.optim.arena import (
    Moments,
    arena_bytes,
    arena_roles,
    plan_arena,
    trainable_parameters,
)
from fastdistill.optim.layout import Entry, Layout
from fastdistill.parallel.modes import Mode
from fastdistill.parallel.units import LARGEST_UNIT, gathering_units, unit_of_parameters


@dataclasses.dataclass(frozen=True)
class NetworkPlan:
    """One network's memory; activations and workspaces of kernels are not part of it."""

    name: str
    mode: Mode
    shards: int
    """Ranks that hold the network together."""
    parameters: int
    """Of the whole network, trained and frozen."""
    units: dict[str, int]
    """Parameters that are gathered together, by the name of their module; the root's is ""."""
    bytes: dict[str, int]
    """Bytes on one rank, padding included:

        parameter, gradient, exp_avg, exp_avg_sq, ema_0 ..., copy   the arena's roles
        frozen      weights that are not trained: whole in single, else this rank's shards
        gathered    weights that FSDP2 has gathered, in the compute dtype. resident: all units, and
                    the largest once more, while it is copied out of the buffer that it was gathered
                    into. fsdp: the root and the two largest others, of which one is at work and
                    the next on its way
        unreduced   gradients before their reduce-scatter: the largest unit's as autograd makes
                    them, in the compute dtype, and as they are sent, in float32; where gradients
                    accumulate over several batches, those of all parameters too, in float32
    """

    @property
    def total(self) -> int:
        """Bytes on one rank, all together."""
        return sum(self.bytes.values())


def plan_network(
    module: nn.Module,
    *,
    name: str,
    mode: Mode,
    shards: int = 1,
    compute_dtype: torch.dtype | None = None,
    averages: int = 0,
    moments: Moments = "float32",
    accumulates: bool = False,
    largest_unit: int = LARGEST_UNIT,
) -> NetworkPlan:
    """Plan what `Parallel.arena`, or for a frozen network `Parallel.shard`, will make of it.

    Args:
        module: the network, on any device. A frozen one, with no parameter that requires a
            gradient, is counted in the dtype that it has.
        name: what it is called in tables.
        mode: of `Parallel`. A frozen network that every rank holds whole is "single".
        shards: ranks that hold it together; replicas of them (HSDP) change nothing on a rank.
        compute_dtype: dtype that trained weights compute in; their own if None.
        averages: number of moving averages.
        moments: float32 or 8bit.
        accumulates: whether an update's gradient is the sum of several backward passes.
        largest_unit: bound of a unit's parameters.

    Raises:
        ValueError: for several shards in mode single.
    """
    if mode == "single" and shards != 1:
        raise ValueError(
            f"mode single holds a network whole, but shards is {shards}; expected 1, or mode "
            "resident or fsdp"
        )
    names = [] if mode == "single" else gathering_units(module, largest_unit)
    owners = unit_of_parameters(module, names)
    units = dict.fromkeys(["", *names], 0)
    for key, parameter in module.named_parameters():
        units[["", *names][owners[key]]] += parameter.numel()
    trained, taken = bool(trainable_parameters(module)), {}
    if trained:
        taken = _arena(module, mode, shards, owners, compute_dtype, averages, moments)
    padded = _padded(module, shards)
    frozen = [pair for pair in module.named_parameters() if not pair[1].requires_grad]
    if frozen:
        taken["frozen"] = sum(padded[key] // shards * value.itemsize for key, value in frozen)
    if mode != "single":
        taken["gathered"] = _gathered(module, owners, padded, compute_dtype, mode == "resident")
    if mode != "single" and trained:
        taken["unreduced"] = _unreduced(module, owners, padded, compute_dtype, accumulates)
    return NetworkPlan(name, mode, shards, sum(units.values()), units, taken)


def plan_table(plans: Sequence[NetworkPlan]) -> str:
    """Bytes of each role on one rank, a network a line, in Markdown."""
    roles = list(dict.fromkeys(role for plan in plans for role in plan.bytes))
    lines = [
        ["network", "parameters", "mode", "shards", *roles, "together"],
        ["---", "---:", "---", *["---:"] * (len(roles) + 2)],
    ]
    for plan in plans:
        held = [_human(plan.bytes[role]) if role in plan.bytes else "-" for role in roles]
        size = f"{plan.parameters / 1e6:,.1f} M"
        lines.append([plan.name, size, plan.mode, str(plan.shards), *held, _human(plan.total)])
    sums = [_human(sum(plan.bytes.get(role, 0) for plan in plans)) for role in roles]
    total = _human(sum(plan.total for plan in plans))
    lines.append(["all", "", "", "", *sums, f"**{total}**"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _arena(
    module: nn.Module,
    mode: Mode,
    shards: int,
    owners: Mapping[str, int],
    compute_dtype: torch.dtype | None,
    averages: int,
    moments: Moments,
) -> dict[str, int]:
    """Bytes of each role, as `Parallel.arena` allocates them."""
    if mode != "single":
        roles = arena_roles([torch.float32], averages=averages, moments=moments)
        return arena_bytes(plan_arena(module, shards=shards, units=owners), roles)
    computing = [compute_dtype or value.dtype for _, value in trainable_parameters(module)]
    roles = arena_roles(computing, averages=averages, moments=moments)
    return arena_bytes(plan_arena(module), roles)


def _padded(module: nn.Module, shards: int) -> dict[str, int]:
    """Elements of each parameter over all shards, with FSDP2's padding."""
    entries = [Entry((key,), tuple(value.shape)) for key, value in module.named_parameters()]
    layout = Layout(entries, shards=shards)
    return {entry.names[0]: layout.padded(entry.names[0]) * shards for entry in entries}


def _gathered(
    module: nn.Module,
    owners: Mapping[str, int],
    padded: Mapping[str, int],
    dtype: torch.dtype | None,
    resident: bool,
) -> int:
    units = [0] * (max(owners.values()) + 1)
    for key, value in module.named_parameters():
        units[owners[key]] += padded[key] * (dtype or value.dtype).itemsize
    root, *others = units
    return sum(units) + max(units) if resident else root + sum(sorted(others)[-2:])


def _unreduced(
    module: nn.Module,
    owners: Mapping[str, int],
    padded: Mapping[str, int],
    dtype: torch.dtype | None,
    accumulates: bool,
) -> int:
    units, whole = [0] * (max(owners.values()) + 1), 0
    for key, value in module.named_parameters():
        if value.requires_grad:
            made, sent = value.numel() * (dtype or value.dtype).itemsize, padded[key] * 4
            units[owners[key]] += made + sent
            whole += value.numel() * 4
    return max(units) + (whole if accumulates else 0)


def _human(count: int) -> str:
    """Bytes in the largest unit of which there is at least one."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
