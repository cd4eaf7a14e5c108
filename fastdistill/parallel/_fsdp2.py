"""What the arena needs of FSDP2's inside: every use of a name that torch does not document.

FSDP2 keeps a unit's shards as separate padded buffers, gathers from those, and has its
reduce-scatter write one flat buffer of which every gradient is a view, in the order of the unit's
list of parameters with running sums of padded sizes as offsets. Both can be put elsewhere: the
buffers by assignment, the output by a custom reduce-scatter's ``allocate``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from fastdistill.parallel.sharded import ShardedArena

_USED = ("_sharded_param_data", "sharded_param", "padded_sharded_param_size")
# torch 2.13 renamed it, and warns at the old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_log = logging.getLogger("fastdistill")


class UnitInArena:
    """One unit whose shards and reduced gradients lie in an arena.

    As a custom reduce-scatter it is asked for the input buffer and then for the output.

    Args:
        arena: where they lie.
        module: the unit's module.
        group: FSDP2's group of its parameters.
        number: the unit's index in the arena's layout.
    """

    def __init__(self, arena: ShardedArena, module: Any, group: Any, number: int) -> None:
        names = dict(zip(arena.parameters, arena.names, strict=True))
        held = [one for one in group.fsdp_params if one.sharded_param in names]
        offsets = {one: arena.layout.offset(names[one.sharded_param]) for one in held}
        # FSDP2 lays gradients out in the order of this list; frozen parameters have none.
        group.fsdp_params.sort(key=lambda one: offsets.get(one, arena.layout.size))
        held.sort(key=offsets.__getitem__)
        self._held = [(one, offsets[one]) for one in held]
        start, end = arena.layout.units[number]
        gradient = arena.ranges["gradient"]
        # FSDP2 counts offsets from the storage's begin, so the unit needs a storage of its own.
        size = gradient.element_size()
        storage = gradient.untyped_storage()[start * size : end * size]
        self._gradient = gradient.new_empty(0).set_(storage)
        self._awaits_output = False
        self.landed = False
        """Whether this update's gradients were reduced into the arena."""
        self.show(arena.ranges["parameter"])
        module.set_custom_reduce_scatter(self)

    @torch.no_grad()
    def show(self, flat: Tensor) -> None:
        """Gather from another range of the arena from now on."""
        for one, offset in self._held:
            rows = one.sharded_param._local_tensor.shape
            padded = one.padded_sharded_param_size
            one._sharded_param_data = flat[offset : offset + padded.numel()]
            local = one._sharded_param_data.view(padded).narrow(0, 0, rows[0])
            one.sharded_param._local_tensor = local.view(rows)

    def require_gradients(self, wanted: bool) -> None:
        """Tell gathered weights too, which FSDP2 does only when it gathers."""
        for one, _ in self._held:
            if hasattr(one, "_unsharded_param"):
                one._unsharded_param.requires_grad_(wanted)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the input, then for the output, of a reduce-scatter."""
        self._awaits_output = not self._awaits_output
        fits = torch.Size(size) == self._gradient.shape and dtype == self._gradient.dtype
        if self._awaits_output or self.landed or not fits:
            return torch.empty(*size, dtype=dtype, device=device)
        self.landed = True
        return self._gradient

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce and scatter."""
        return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def move_into_arena(arena: ShardedArena, modules: Sequence[FSDPModule]) -> list[UnitInArena] | None:
    """Move every unit's shards and gradients into the arena, or None where torch has no way."""
    groups = [_groups(module) for module in modules]
    missing = _missing_hooks(groups)
    if missing:
        _log.warning(
            "FSDP2 of torch %s has no %s: shards stay where it puts them, and each update copies "
            "them to the arena and back",
            torch.__version__,
            missing,
        )
        return None
    trained = {entry.unit for entry in arena.layout.entries}
    order = sorted(trained)
    return [
        UnitInArena(arena, modules[number], groups[number][0], order.index(number))
        for number in order
    ]


def keep_gathered_memory(modules: Sequence[FSDPModule]) -> None:
    """Let gathered weights keep their memory, and so their addresses, when they are given up.

    Raises:
        RuntimeError: where this torch has no such hook.
    """
    for one in (
        one for module in modules for group in _groups(module) for one in group.fsdp_params
    ):
        if not hasattr(one, "free_unsharded_param"):
            raise RuntimeError(
                f"FSDP2 of torch {torch.__version__} has no free_unsharded_param, so that gathered "
                "weights change their addresses; turn cuda_graph off"
            )
        one.free_unsharded_param = lambda: None


def communication_streams(modules: Sequence[FSDPModule]) -> list[torch.cuda.Stream]:
    """The CUDA streams on which FSDP2 gathers and reduces, once a forward has made them."""
    found: dict[torch.cuda.Stream, None] = {}
    for module in modules:
        context = vars(module._get_fsdp_state()._comm_ctx)
        found |= dict.fromkeys(v for v in context.values() if isinstance(v, torch.cuda.Stream))
    return list(found)


def _groups(module: Any) -> list[Any]:
    """FSDP2's groups of a module's parameters: one, or none where all are its children's."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def _missing_hooks(groups: Sequence[Sequence[Any]]) -> str | None:
    """Name of the first hook that this torch does not have."""
    if not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        return "set_custom_reduce_scatter"
    for unit in groups:
        if len(unit) > 1:
            return "single group of parameters a unit"
        for one in unit[0].fsdp_params if unit else ():
            for name in _USED:
                if not hasattr(one, name):
                    return name
    return None
