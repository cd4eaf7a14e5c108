"""How the networks of a run are spread over its processes: single, resident or fsdp."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn

from fastdistill.optim.arena import Arena, Moments
from fastdistill.optim.transfer import checksums
from fastdistill.parallel.ranks import Ranks
from fastdistill.parallel.sharded import ShardedArena, shard
from fastdistill.parallel.units import LARGEST_UNIT

Mode = Literal["single", "resident", "fsdp"]

LARGEST_RESIDENT = 3_000_000_000
"""Parameters of a network whose gathered bfloat16 weights, 6 GB, may stay on every rank."""

_METHODS = ("features", "forward_with_features")


def fitting_mode(processes: int, module: nn.Module) -> Mode:
    """The mode for this many processes and a network of this size."""
    if processes == 1:
        return "single"
    size = sum(parameter.numel() for parameter in module.parameters())
    return "resident" if size <= LARGEST_RESIDENT else "fsdp"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The processes of a run and what each of them holds of a network.

        single    one process, everything
        resident  shards of master weights, gradients, moments and averages; the gathered weights
                  stay from one update of the network to the next, which gathers them once
        fsdp      the same, and gathered weights only of the unit at work

    Raises:
        ValueError: for a mode that does not fit the number of processes.
    """

    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    mode: Mode = "single"
    shards: int | None = None
    """Neighbouring ranks that hold a network together; all if None. Fewer make several replicas of
    the shards (HSDP), whose weights are gathered within one node, say."""
    largest_unit: int = LARGEST_UNIT
    """Bound of the parameters that are gathered together."""
    resident_roles: tuple[str, ...] = ()
    """Roles whose gathered weights stay in mode fsdp too, as the student's from one of its updates
    to the next, where memory allows."""

    def __post_init__(self) -> None:
        if self.mode == "single" and self.ranks.size > 1:
            raise ValueError(
                f"mode single is for one process, but there are {self.ranks.size}; choose "
                "parallel.mode resident (networks up to about three billion parameters) or fsdp"
            )
        if self.mode != "single" and self.ranks.group is None:
            raise ValueError(
                f"mode {self.mode} spreads networks over processes; start it with torchrun, or "
                "choose parallel.mode single"
            )

    @staticmethod
    def fitting(ranks: Ranks, module: nn.Module) -> Mode:
        """The mode for these processes and a network of this size."""
        return fitting_mode(ranks.size, module)

    def arena(
        self,
        module: nn.Module,
        role: str,
        *,
        compute_dtype: torch.dtype | None = None,
        averages: int = 0,
        moments: Moments = "float32",
        static: bool = False,
    ) -> Arena:
        """Take over a network that will be trained, sharding it where the mode says so.

        Args:
            module: the network in float32, or a denoiser with it, alike on all ranks.
            role: what it is in the run, as student.
            compute_dtype: dtype that its forwards compute in; float32 if None.
            averages: number of moving averages of its weights.
            moments: float32 or 8bit.
            static: keep gathered weights where they are, as a CUDA graph needs them.

        Raises:
            ValueError: where ranks hold different weights.
        """
        self.check_alike(module)
        if self.mode == "single":
            return Arena(module, compute_dtype=compute_dtype, averages=averages, moments=moments)
        resident = self.mode == "resident" or role in self.resident_roles
        self.shard(module, resident=resident, compute_dtype=compute_dtype)
        return ShardedArena(
            module,
            prefetch=resident and not static,
            static=static,
            averages=averages,
            moments=moments,
        )

    def check_alike(self, module: nn.Module) -> None:
        """Make sure that all ranks begin with the same weights, which nothing would notice later.

        Raises:
            ValueError: naming a rank and a tensor that differ from the first rank's.
        """
        if self.ranks.size == 1:
            return
        found = self.ranks.gather_objects(checksums(module))
        for rank, own in enumerate(found):
            differing = [name for name in own if own.get(name) != found[0].get(name)]
            if differing:
                raise ValueError(
                    f"rank {rank} has other weights than rank 0 in {len(differing)} tensors, as "
                    f"{differing[0]}; load the same file, or seed alike, on all ranks"
                )

    def shard(
        self, module: nn.Module, *, resident: bool = False, compute_dtype: torch.dtype | None = None
    ) -> None:
        """Apply FSDP2 to a network, or to that of a denoiser, as to a teacher that does not fit."""
        network: Any = getattr(module, "network", module)
        shard(
            network,
            self.ranks.mesh(self.shards),
            resident=resident,
            compute_dtype=compute_dtype,
            largest_unit=self.largest_unit,
            methods=[name for name in _METHODS if hasattr(network, name)],
        )
