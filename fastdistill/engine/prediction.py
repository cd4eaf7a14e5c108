"""How long a cycle will take on a named GPU, predicted from what was counted.

    GPU    operations / (share x peak) + bytes / (share x bandwidth), part by part
    host   launches x what one costs; the GPU never waits for results, so that the longer counts
    links  gathers of weights and reductions of gradients, most of them behind the networks' work

Every share is one of `Assumptions`. None of it was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastdistill.config import TrainingSettings
from fastdistill.engine.cycle import Cycle, Part
from fastdistill.engine.gpus import (
    GPU,
    Assumptions,
    bus_bandwidth,
    device_seconds,
    host_seconds,
)
from fastdistill.parallel import NetworkPlan

_STATES = ("parameter", "exp_avg", "exp_avg_sq", "ema_0")


class Tensors(NamedTuple):
    """How many parameters a network has, as tensors: what is done one by one costs the host."""

    all: int
    trained: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One part of a cycle, once, on one GPU."""

    update: str
    """Whose update: student or critic."""
    name: str
    times: float
    """How often it happens in a cycle."""
    flops: float
    bytes: float
    """Moved by kernels that are bound by memory."""
    kernels: float
    seconds: Mapping[str, float]
    """Of the GPU, by what bounds them: linear, convolution, attention, memory-bound, optimizer,
    copies of collectives."""
    host: float
    """Seconds in which the host launches it."""

    @property
    def device(self) -> float:
        """Seconds of the GPU."""
        return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A cycle's predicted time; nothing of it was measured."""

    rows: list[Row]
    collectives: float
    """Seconds of collectives, hidden behind other work or not."""
    exposed: float
    """Seconds of them during which nothing else runs."""
    batch: int
    """Samples of an update on all ranks."""
    updates: int
    """Steps of a cycle, each a critic update."""
    one_launch: bool
    """Whether a step is one launch, from a CUDA graph."""

    @property
    def device(self) -> float:
        """Seconds of the GPU's work in a cycle, collectives aside."""
        return sum(row.times * row.device for row in self.rows)

    @property
    def host(self) -> float:
        """Seconds in which the host launches a cycle."""
        return 0.0 if self.one_launch else sum(row.times * row.host for row in self.rows)

    @property
    def cycle(self) -> float:
        """Seconds of a cycle: the longer of the two, and collectives that are not hidden."""
        return max(self.device, self.host) + self.exposed

    @property
    def samples_per_second(self) -> float:
        """Samples of a cycle's steps a second, on all ranks, as a run's log counts images."""
        return self.batch * self.updates / self.cycle

    def shares(self) -> dict[str, float]:
        """Seconds of a cycle by what bounds them, the largest first; they add up to ``cycle``."""
        found: dict[str, float] = {}
        for row in self.rows:
            for kind, seconds in row.seconds.items():
                found[kind] = found.get(kind, 0) + row.times * seconds
        found["collectives"] = self.exposed
        found["host"] = max(0.0, self.host - self.device)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def bottleneck(self) -> str:
        """What takes most of the cycle."""
        return next(iter(self.shares()))


def predict(
    cycle: Cycle,
    networks: Sequence[NetworkPlan],
    training: TrainingSettings,
    gpu: GPU,
    *,
    ranks: int,
    shards: int,
    batch: int,
    tensors: Mapping[str, Tensors],
    assumed: Assumptions,
) -> Prediction:
    """Predict the time of a cycle.

    Args:
        cycle: what was counted.
        networks: how each network is held.
        training: precision, accumulation and whether steps are CUDA graphs.
        gpu: what it runs on.
        ranks: number of GPUs.
        shards: GPUs that hold a network together.
        batch: samples of a micro-batch on one GPU.
        tensors: parameters of each network.
        assumed: shares of the peaks, and costs of the host.
    """
    rows = [_networks_row(part, batch, training, gpu, assumed) for part in cycle.parts]
    exchange = _Exchange(training, gpu, ranks, shards, tensors, assumed)
    collectives = 0.0
    for plan in networks:
        updates = cycle.updates.get(plan.name, 0)
        if updates:
            rows.append(_optimizer_row(plan, updates, tensors[plan.name], training, gpu, assumed))
        if plan.mode != "single":
            gathers = updates
            if plan.mode == "fsdp":
                gathers = round(cycle.passes.get(plan.name, 0) * training.accumulation)
            rows.append(exchange.copies(plan, gathers, updates))
            collectives += exchange.seconds(plan, gathers, updates)
    return Prediction(
        rows,
        collectives,
        (1 - assumed.hidden) * collectives,
        batch * ranks * training.accumulation,
        max(cycle.updates.values()),
        training.cuda_graph,
    )


def _networks_row(
    part: Part, batch: int, training: TrainingSettings, gpu: GPU, assumed: Assumptions
) -> Row:
    work, backward = part.work, part.name == "backward"
    return Row(
        part.update,
        part.name,
        part.times * training.accumulation,
        work.total_flops.at(batch),
        work.total_bytes.at(batch),
        sum(work.kernels.values()),
        device_seconds(work, batch, gpu, training.precision, assumed, backward=backward),
        host_seconds(work, assumed, backward=backward, graph=part.has_graph),
    )


def _optimizer_row(
    plan: NetworkPlan,
    updates: int,
    tensors: Tensors,
    training: TrainingSettings,
    gpu: GPU,
    assumed: Assumptions,
) -> Row:
    """Norm and update, and in mode single what brings gradients into the arena.

    They are added to it one by one and cleared after the update; or, where they are dropped, the
    first of an update are new tensors, which are copied into it.
    """
    states = sum(plan.bytes.get(role, 0) for role in _STATES)
    gradient, sums = plan.bytes["gradient"], 0
    moved = 2 * states + plan.bytes.get("copy", 0) + 2 * gradient
    if plan.mode == "single":
        sums = training.accumulation - training.drop_gradients
        moved += 3 * gradient * sums + (2 if training.drop_gradients else 1) * gradient
    else:
        moved += gradient
    rate = assumed.optimizer_bandwidth * gpu.bandwidth
    name, kernels = f"{plan.name} optimizer", 3 + sums * tensors.trained
    host = assumed.optimizer_launch + assumed.launch_backward * sums * tensors.trained
    return Row(_owner(plan), name, updates, 0, moved, kernels, {"optimizer": moved / rate}, host)


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """Collectives of FSDP2."""

    training: TrainingSettings
    gpu: GPU
    ranks: int
    shards: int
    tensors: Mapping[str, Tensors]
    assumed: Assumptions

    @property
    def itemsize(self) -> int:
        """Bytes of a gathered weight."""
        return 2 if self.training.precision == "bfloat16" else 4

    def copies(self, plan: NetworkPlan, gathers: int, reductions: int) -> Row:
        """Shards are cast and copied and gathered weights copied out; gradients are copied in."""
        size, shards = plan.parameters, self.shards
        moved = gathers * (10 * size / shards + 2 * self.itemsize * size)
        moved += reductions * (self.itemsize + 4) * size
        rate = self.assumed.optimizer_bandwidth * self.gpu.bandwidth
        name = f"{plan.name}: gathers {gathers}, reductions {reductions}"
        seconds = {"copies of collectives": moved / rate}
        tensors = self.tensors[plan.name]
        host = gathers * self.assumed.gather_tensor * tensors.all
        host += reductions * self.assumed.reduce_tensor * tensors.trained
        return Row(_owner(plan), name, 1, 0, moved, 0, seconds, host)

    def seconds(self, plan: NetworkPlan, gathers: int, reductions: int) -> float:
        """Of the links: gathers and reduce-scatters among shards, all-reduces among replicas."""
        size, shards, replicas = plan.parameters, self.shards, self.ranks // self.shards
        sent = (gathers * self.itemsize + reductions * 4) * size * (shards - 1) / shards
        seconds = sent / bus_bandwidth(self.gpu, shards, self.assumed)
        across = reductions * 2 * 4 * size / shards * (replicas - 1) / replicas
        return seconds + across / bus_bandwidth(self.gpu, self.ranks, self.assumed)


def _owner(plan: NetworkPlan) -> str:
    return "student" if plan.name in ("student", "teacher") else "critic"
