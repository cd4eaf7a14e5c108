"""FSDP2 with its shards and its reduced gradients in an arena.

`shard` applies torch's ``fully_shard`` to a network, unit by unit. `ShardedArena` then moves what
FSDP2 allocated tensor by tensor into flat ranges: this rank's shards into the masters' range, with
FSDP2's own padding and order, and each unit's reduce-scatter straight into the gradients' range.
The update is the same one pass as on one GPU, and FSDP2 notices nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from fastdistill.optim.arena import (
    Arena,
    Group,
    Moments,
    arena_roles,
    plan_arena,
    trainable_parameters,
)
from fastdistill.parallel._fsdp2 import (
    UnitInArena,
    communication_streams,
    keep_gathered_memory,
    move_into_arena,
)
from fastdistill.parallel.channels_last import (
    hold_channels_last_weights,
    is_held_channels_last,
    to_usual,
)
from fastdistill.parallel.units import LARGEST_UNIT, gathering_units, owner


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    resident: bool,
    compute_dtype: torch.dtype | None = None,
    largest_unit: int = LARGEST_UNIT,
    methods: Iterable[str] = (),
) -> None:
    """Apply FSDP2 to a network in place: to each gathering unit, then to the root.

    Gradients are averaged over the ranks, in float32. Channels-last convolutions stay so.

    Args:
        module: the network, float32 and alike on all ranks.
        mesh: 1-D (shard), or 2-D (replicate, shard) for HSDP.
        resident: keep weights once they are gathered, until `ShardedArena.publish`; else a unit's
            are freed after its forward and after its backward.
        compute_dtype: dtype that weights are gathered in; their own if None.
        largest_unit: bound of a unit's parameters.
        methods: names of methods of the network that are called as ``forward`` is.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    hold_channels_last_weights(module)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for name in gathering_units(module, largest_unit):
        fully_shard(module.get_submodule(name), reshard_after_forward=not resident, **options)
    # None frees a root's weights only after its backward, which comes next.
    fully_shard(module, reshard_after_forward=False if resident else None, **options)
    for method in methods:
        register_fsdp_forward_method(module, method)
    root: Any = module
    root.set_reshard_after_backward(not resident)
    if hasattr(root, "set_reduce_scatter_unused_params"):  # torch 2.13
        root.set_reduce_scatter_unused_params(True)


class ShardedArena(Arena):
    """This rank's shards of a network that FSDP2 shards, in flat ranges.

    Where torch lacks one of the hooks by which FSDP2 lets its memory be moved, the arena keeps a
    copy of the shards, which every update reads and writes; it warns once.

    Args:
        module: the network, sharded by `shard` or by ``fully_shard`` on dimension 0.
        prefetch: start to gather all units when an update is published, beside what the device does
            until the next forward; for resident weights.
        static: gather into the same memory every time, within the update; for resident weights of
            which a CUDA graph knows the address.
        group: parameter group of each parameter; one for all if None.
        averages: number of moving averages.
        moments: float32 or 8bit.

    Raises:
        ValueError: for a network that is not sharded, or not in float32.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        prefetch: bool = False,
        static: bool = False,
        group: Group | None = None,
        averages: int = 0,
        moments: Moments = "float32",
    ) -> None:
        named = trainable_parameters(module)
        parameters = [_checked(names[0], parameter) for names, parameter in named]
        mesh = parameters[0].device_mesh
        self._rank = mesh.get_local_rank(mesh.ndim - 1)
        self._group = mesh.get_group(mesh.ndim - 1)
        units: dict[str, Any] = {
            name: part for name, part in module.named_modules() if isinstance(part, FSDPModule)
        }
        self._modules, self._prefetch, self._static = list(units.values()), prefetch, static
        numbers = {name: number for number, name in enumerate(units)}
        owners = {names[0]: numbers[owner(names[0], numbers)] for names, _ in named}
        size = mesh.size(mesh.ndim - 1)
        layout = plan_arena(module, group=group, shards=size, units=owners)
        roles = arena_roles([torch.float32], averages=averages, moments=moments)
        self._allocate(layout, parameters, roles)
        self._sharded = parameters
        self._channels_last = {
            f"{name}.weight" for name, part in module.named_modules() if is_held_channels_last(part)
        }
        self._gradients = self.views("gradient")
        with torch.no_grad():
            torch._foreach_copy_(self.views("parameter"), self._shards())
            self.restart_averages()
        self._shown = "parameter"
        self._moved: list[UnitInArena] | None = move_into_arena(self, self._modules)
        if static:
            keep_gathered_memory(self._modules)

    @property
    def attached(self) -> bool:
        """Whether FSDP2 works in the arena, or on shards of its own that updates copy."""
        return self._moved is not None

    @property
    def shard(self) -> int:
        return self._rank

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self._sharded, strict=True):
            part = _like(parameter, self.view(name, flat))
            named[name] = to_usual(part) if name in self._channels_last else part
        return named

    @torch.no_grad()
    def whole(self, role: str) -> dict[str, Tensor]:
        parts: dict[str, Any] = self.named(self.ranges[role])
        return {name: part.full_tensor().cpu() for name, part in parts.items()}

    def publish(self) -> None:
        """Let the next forward gather the weights anew, after an update."""
        self._show("parameter")
        if self._prefetch:
            for module in self._modules:
                module.unshard(async_op=True)

    def side_streams(self) -> list[torch.cuda.Stream]:
        return communication_streams(self._modules)

    def reduce_gradients(self, wanted: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(wanted, recurse=False)

    def _require_gradients(self, wanted: bool) -> None:
        super()._require_gradients(wanted)
        for unit in self._moved or ():
            unit.require_gradients(wanted)

    @torch.no_grad()
    def _show(self, role: str) -> None:
        for module in self._modules:
            module.reshard()
        flat = self.ranges[role]
        if self._moved is None:
            views = [self.view(name, flat) for name in self.names]
            torch._foreach_copy_(self._shards(), views)
        elif role != self._shown:
            for unit in self._moved:
                unit.show(flat)
        self._shown = role
        if self._static:
            for module in self._modules:
                module.unshard()

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Bring gradients that FSDP2 reduced elsewhere into the arena; missing ones are zero."""
        if self._moved is not None and all(unit.landed for unit in self._moved):
            return
        for parameter, view in zip(self.parameters, self._gradients, strict=True):
            gradient: Any = parameter.grad
            if gradient is None:
                view.zero_()
            elif gradient.to_local().data_ptr() != view.data_ptr():
                view.copy_(gradient.to_local())

    def collect_weights(self) -> None:
        """Nothing: FSDP2 keeps its shards in the masters' dtype and place."""

    def mark_written(self) -> None:
        """Nothing: FSDP2 gathers the weights of a graph for its backward."""

    def zero_gradients(self) -> None:
        """Forget all gradients; what is reduced next overwrites the range."""
        self.drop_gradients()

    def drop_gradients(self) -> None:
        super().drop_gradients()
        for unit in self._moved or ():
            unit.landed = False

    def _shards(self) -> list[Tensor]:
        return [parameter.to_local() for parameter in self._sharded]

    def sum_over_shards_(self, value: Tensor) -> None:
        dist.all_reduce(value, group=self._group)


def _checked(name: str, parameter: Tensor) -> DTensor:
    if not isinstance(parameter, DTensor):
        raise ValueError(
            f"{name} is not sharded; apply fastdistill.parallel.shard to the whole network, and "
            "make its arena while no forward has gathered it"
        )
    if parameter.dtype != torch.float32:
        raise ValueError(
            f"{name} is {parameter.dtype}; expected float32 shards, which are gathered in the "
            "compute_dtype of fastdistill.parallel.shard"
        )
    return parameter


def _like(parameter: DTensor, local: Tensor) -> DTensor:
    """This rank's part of a tensor that is sharded as a parameter is."""
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
