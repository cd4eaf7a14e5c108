"""`Ranks`: the processes of a run, what they say to each other, and how they end together.

One process alone is the usual case and needs no process group. Several are started by ``torchrun``;
a rank that dies or stops makes the others end with `RankLostError` within a set time.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastdistill.parallel.roll_call import RollCall

# torch 2.13 renamed it, and warns at the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_LOST = re.compile(
    r"timed? ?out|connection (closed|reset|refused)|reset by peer|broken pipe|pair closure"
    r"|monitoredbarrier|remote worker",
    re.IGNORECASE,
)


class RankLostError(RuntimeError):
    """A process of the run died, stopped, or does something else than the others."""


class Ranks:
    """The processes of a run; made alone, or by `start` from what ``torchrun`` says.

    Args:
        device: this process' device. One process alone has no process group, and every method
            gives back what it got.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine.
        device: where this process computes.
        group: all ranks, for tensors on ``device``; None alone.
        control: all ranks, for messages between CPUs (gloo); None alone.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.local_rank = 0, 1, 0
        self.device = torch.device(device)
        self.group: dist.ProcessGroup | None = None
        self.control: dist.ProcessGroup | None = None
        self._meshes: dict[int, DeviceMesh] = {}
        self._timeout = datetime.timedelta(0)
        self._roll_call: RollCall | None = None

    @classmethod
    def start(cls, device: str = "cpu", timeout: float = 600.0) -> Ranks:
        """Join the processes that ``torchrun`` started, or be alone where it did not.

        Args:
            device: cpu (gloo) or cuda (nccl, each process on the GPU of its local rank).
            timeout: seconds that a rank waits for the others in any exchange.

        Raises:
            RankLostError: where not every rank came in time.
        """
        if "RANK" not in os.environ:
            return cls(device)
        ranks = cls(device)
        ranks.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if ranks.device.type == "cuda":
            ranks.device = torch.device("cuda", ranks.local_rank)
            torch.cuda.set_device(ranks.device)
        ranks._timeout = datetime.timedelta(seconds=timeout)
        try:
            ranks._join()
        except dist.DistError as error:
            raise RankLostError(
                f"not every process of the run came within {timeout:g} s: {_first_line(error)}"
            ) from error
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def mesh(self, shards: int | None = None) -> DeviceMesh:
        """A mesh over all ranks, the same one at every call.

        Args:
            shards: over how many neighbouring ranks a network is split; all by default.

        Returns:
            A mesh of ("shard",), or of ("replicate", "shard") where ``shards`` is less than `size`.

        Raises:
            ValueError: if ``shards`` does not divide the number of ranks.
            RuntimeError: for one process alone.
        """
        shards = self.size if shards is None else shards
        if self.group is None:
            raise RuntimeError("one process alone has no mesh; start the run with torchrun")
        if shards < 1 or self.size % shards:
            raise ValueError(f"{self.size} ranks cannot be split into shards of {shards}")
        if shards not in self._meshes:
            with self.watching():
                self._meshes[shards] = self._make_mesh(shards)
        return self._meshes[shards]

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor [N, …], of one shape, one after the other: [size · N, …]."""
        if self.group is None:
            return tensor
        whole = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        with self.watching():
            _all_gather(whole, tensor.contiguous(), group=self.group)
        return whole

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor on the device by its sum over the ranks."""
        if self.group is not None:
            with self.watching():
                dist.all_reduce(tensor, group=self.group)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        with self.watching():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The value of rank ``source``."""
        if self.control is None:
            return value
        values = [value]
        with self.watching():
            dist.broadcast_object_list(values, src=source, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait for every rank.

        Raises:
            RankLostError: naming the ranks that did not come in time.
        """
        if self.control is not None:
            with self.watching():
                dist.monitored_barrier(self.control, self._timeout, wait_all_ranks=True)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: the same answer on all."""
        if self.control is None:
            return flag
        answer = torch.tensor([flag], dtype=torch.uint8)
        with self.watching():
            dist.all_reduce(answer, dist.ReduceOp.MAX, group=self.control)
        return bool(answer.item())

    def for_thread(self) -> Ranks:
        """The same processes with a ``control`` of its own; all ranks ask for it together.

        What a background thread says over it never meets what the training says.
        """
        other = copy.copy(self)
        if self.control is not None:
            with self.watching():
                other.control = dist.new_group(backend="gloo", timeout=self._timeout)
        return other

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Turn what torch raises when a rank does not answer into `RankLostError`.

        It covers any exchange inside, as those of a backward pass, and says within a few seconds
        which ranks are gone. nccl's own watchdog may end the process before: that is torch's way.
        """
        try:
            yield
        except RankLostError:
            raise
        except RuntimeError as error:
            if self._roll_call is None or not _says_lost(error):
                raise
            raise RankLostError(self._explain(self._roll_call.missing(), error)) from error

    def close(self) -> None:
        """Leave the run; the object is of no use afterwards."""
        if self._roll_call is not None:
            self._roll_call.close()
            dist.destroy_process_group()

    def _join(self) -> None:
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=self._timeout))
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=self._timeout,
        )
        self.group = dist.group.WORLD
        self.control = dist.new_group(backend="gloo", timeout=self._timeout)
        self._roll_call = RollCall(store, self.rank, self.size)

    def _make_mesh(self, shards: int) -> DeviceMesh:
        assert self.group is not None
        if shards == self.size:
            return DeviceMesh.from_group(self.group, self.device.type, mesh_dim_names=("shard",))
        rows = torch.arange(self.size).view(-1, shards)
        # Made here, since groups that a mesh makes itself wait for torch's default time.
        groups = [
            dist.new_subgroups_by_enumeration(members.tolist(), timeout=self._timeout)[0]
            for members in (rows.T, rows)
        ]
        return DeviceMesh.from_group(
            groups, self.device.type, rows, mesh_dim_names=("replicate", "shard")
        )

    def _explain(self, missing: list[int] | None, error: RuntimeError) -> str:
        who = f"rank {self.rank} of {self.size}: "
        if missing is None:
            who += "rank 0, which keeps the list of ranks, does not answer"
        elif missing:
            names = ", ".join(map(str, missing))
            who += f"rank{'s' * (len(missing) > 1)} {names} did not answer"
        else:
            return (
                f"{who}all ranks live, but one came later than {self._timeout.total_seconds():g} s "
                f"or asked for another exchange than the others ({_first_line(error)})"
            )
        return f"{who}: killed, stopped, or ended by an error of its own ({_first_line(error)})"


def _says_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
