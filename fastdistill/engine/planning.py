"""What a job will take and how long, before anything of it is allocated.

Memory is counted: the arena's roles and gathered weights by `fastdistill.parallel.plan_network`,
activations by running a cycle on the meta device (`fastdistill.engine.cycle`). Time is predicted
(`fastdistill.engine.prediction`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastdistill.config import ParallelSettings, TrainingSettings
from fastdistill.data import RealBatch
from fastdistill.engine.counting import Size
from fastdistill.engine.cycle import Cycle, count_cycle
from fastdistill.engine.gpus import GIB, GPU, Assumptions
from fastdistill.engine.prediction import Prediction, Tensors, predict
from fastdistill.models import Denoiser
from fastdistill.objectives import Objective
from fastdistill.parallel import NetworkPlan, plan_network
from fastdistill.parallel.modes import Mode, fitting_mode


@dataclasses.dataclass(frozen=True)
class PlannedJob:
    """What is planned: networks on the meta device and what the trainer is told."""

    objective: Callable[[bool], Objective]
    """Makes the objective on the meta device as the trainer gets it, with float32 student and
    critic; True recomputes blocks in backward passes."""
    training: TrainingSettings
    parallel: ParallelSettings
    shape: tuple[int, ...]
    """Of one sample."""
    inputs: Callable[[int], RealBatch]
    """Makes a batch of data on the meta device."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the networks are spread, and whether activations are recomputed."""

    mode: Mode
    checkpoint_blocks: bool
    sharded_teacher: bool = False

    def __str__(self) -> str:
        text = self.mode + (", teacher sharded" if self.sharded_teacher else "")
        return text + (", checkpoint_blocks" if self.checkpoint_blocks else "")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; all GPUs take the same."""

    networks: list[NetworkPlan]
    buffers: float
    """Of the networks, as tables of positions."""
    activations: float
    """The most that is alive at once besides the networks: saved activations, temporaries, data."""
    reserve: float
    """Assumed, not counted: CUDA's context, workspaces and fragmentation."""

    @property
    def states(self) -> float:
        """Of the networks: no two have unreduced gradients at once."""
        unreduced = [plan.bytes.get("unreduced", 0) for plan in self.networks]
        total = sum(plan.total for plan in self.networks) + self.buffers
        return total - sum(unreduced) + max(unreduced, default=0)

    @property
    def total(self) -> float:
        """All together."""
        return self.states + self.activations + self.reserve


class Planner:
    """Counts a job once, and answers what it takes for any layout and batch size.

    Args:
        job: what is planned.
        gpus: number of GPUs.
        gpu: their kind.
        assumed: what is not counted.

    Raises:
        ValueError: for a number of GPUs that the recipe's shards do not divide.
    """

    def __init__(
        self, job: PlannedJob, gpus: int, gpu: GPU, assumed: Assumptions | None = None
    ) -> None:
        self.job, self.gpus, self.gpu = job, gpus, gpu
        self.assumed = assumed or Assumptions()
        self.shards = job.parallel.shards or gpus
        if gpus % self.shards:
            raise ValueError(
                f"parallel.shards is {self.shards}, which does not divide {gpus} GPUs; choose a "
                "divisor"
            )
        self._cycles: dict[bool, Cycle] = {}
        self._networks: dict[Layout, list[NetworkPlan]] = {}
        self._objective = job.objective(False)
        modules = {**self._objective.critic_modules(), **self._objective.networks()}
        self._tensors = {role: _tensors(value) for role, value in modules.items()}
        self._buffers = sum(
            value.nbytes for module in modules.values() for value in module.buffers()
        )

    def cycle(self, checkpointed: bool) -> Cycle:
        """The counted cycle, with blocks recomputed or not."""
        if checkpointed not in self._cycles:
            job = self.job
            self._cycles[checkpointed] = count_cycle(
                job.objective(checkpointed),
                job.training,
                job.shape,
                job.inputs,
                checkpointed=checkpointed,
                keeps_gradients=self.gpus == 1 and job.training.drop_gradients,
            )
        return self._cycles[checkpointed]

    def own_layout(self) -> Layout:
        """The recipe's own layout."""
        parallel = self.job.parallel
        mode = parallel.mode
        if mode == "auto":
            mode = fitting_mode(self.gpus, self._objective.student)
        if mode == "single" and self.gpus > 1:
            raise ValueError(
                f"parallel.mode is single, for one process, but --gpus is {self.gpus}; choose "
                "resident or fsdp"
            )
        sharded = parallel.teacher == "sharded" and mode != "single"
        return Layout(mode, parallel.checkpoint_blocks, sharded)

    def own_batch(self) -> int:
        """Samples of a micro-batch on one GPU."""
        size = self.job.training.batch_size
        if size % self.gpus:
            raise ValueError(
                f"training.batch_size is {size}, which {self.gpus} GPUs cannot share equally; "
                "choose a multiple"
            )
        return size // self.gpus

    def networks(self, layout: Layout) -> list[NetworkPlan]:
        """What each network takes on every GPU."""
        if layout not in self._networks:
            self._networks[layout] = self._plan_networks(layout)
        return self._networks[layout]

    def memory(self, layout: Layout, batch: int) -> Memory:
        """Bytes on every GPU with this many samples of a micro-batch on each."""
        activations = self.cycle(layout.checkpoint_blocks).peak.at(batch)
        if self.job.training.sample_reuse > 1:
            activations += self._kept_samples().at(batch)
        training = self.job.training
        if layout.mode == "single" and training.drop_gradients and training.accumulation > 1:
            # From the second micro-batch on the critic's are there in the student's turn too.
            plans = self.networks(layout)[1:]
            activations += sum(plan.bytes.get("gradient", 0) for plan in plans)
        reserve = self.assumed.context + self.assumed.fragmentation * activations
        return Memory(self.networks(layout), self._buffers, activations, reserve)

    def largest_batch(self, layout: Layout, memory: float) -> int:
        """The largest micro-batch of a GPU that fits; 0 if none does."""
        if self.memory(layout, 1).total > memory:
            return 0
        low, high = 1, 2
        while self.memory(layout, high).total <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self.memory(layout, middle).total <= memory else (low, middle)
            )
        return low

    @property
    def can_checkpoint(self) -> bool:
        """Whether the networks can recompute their blocks."""
        return hasattr(self._objective.student.network, "enable_gradient_checkpointing")

    def layouts(self, checkpointed: bool) -> list[Layout]:
        """Every layout that the number of GPUs allows, from the fastest on."""
        if self.gpus == 1:
            return [Layout("single", checkpointed)]
        return [
            Layout("resident", checkpointed),
            Layout("fsdp", checkpointed),
            Layout("fsdp", checkpointed, sharded_teacher=True),
        ]

    def predict(self, layout: Layout, batch: int) -> Prediction:
        """Predict a cycle's time with this many samples of a micro-batch on each GPU."""
        return predict(
            self.cycle(layout.checkpoint_blocks),
            self.networks(layout),
            self.job.training,
            self.gpu,
            ranks=self.gpus,
            shards=1 if layout.mode == "single" else self.shards,
            batch=batch,
            tensors=self._tensors,
            assumed=self.assumed,
        )

    def _kept_samples(self) -> Size:
        """Samples that later steps use again, in float32."""
        return Size(0, 4 * torch.Size(self.job.shape).numel() * self.job.training.accumulation)

    def _plan_networks(self, layout: Layout) -> list[NetworkPlan]:
        objective, training = self._objective, self.job.training
        low = torch.bfloat16 if training.precision == "bfloat16" else None
        shards = 1 if layout.mode == "single" else self.shards
        plans = []
        for role, module in {"student": objective.student, **objective.critic_modules()}.items():
            mode = layout.mode
            if mode == "fsdp" and role in self.job.parallel.resident_roles:
                mode = "resident"
            plans.append(
                plan_network(
                    module,
                    name=role,
                    mode=mode,
                    shards=shards,
                    compute_dtype=low if isinstance(module, Denoiser) else None,
                    averages=int(role == "student"),
                    moments=training.moments,
                    accumulates=training.accumulation > 1,
                    largest_unit=self.job.parallel.largest_unit,
                )
            )
        for role, module in objective.networks().items():
            if role not in {plan.name for plan in plans}:
                plans.append(self._frozen(role, module, layout, shards))
        return plans

    def _frozen(self, role: str, module: nn.Module, layout: Layout, shards: int) -> NetworkPlan:
        if not layout.sharded_teacher:
            return plan_network(module, name=role, mode="single")
        unit = self.job.parallel.largest_unit
        return plan_network(module, name=role, mode="fsdp", shards=shards, largest_unit=unit)


def _tensors(module: nn.Module) -> Tensors:
    needs = [parameter.requires_grad for parameter in module.parameters()]
    return Tensors(len(needs), sum(needs))


def explain_misfit(
    planner: Planner,
    layout: Layout,
    batch: int,
    memory: float,
    others: Sequence[tuple[Layout, int]],
) -> str:
    """One sentence: what a batch needs, what there is, and what to change.

    Args:
        planner: knows the job.
        layout: the recipe's layout, which does not fit.
        batch: samples on a GPU.
        memory: bytes of a GPU that may be used.
        others: layouts and the largest batch of each; 0 where none fits.
    """
    need, gpus = planner.memory(layout, batch).total, planner.gpus
    sentence = (
        f"training.batch_size={batch * gpus} needs {need / GIB:.1f} GiB on each of {gpus} GPUs "
        f"({layout}), and there are {memory / GIB:.1f}"
    )
    advice = []
    largest = dict(others).get(layout, 0)
    accumulation = planner.job.training.accumulation
    if largest:
        factor = next(k for k in range(2, batch + 1) if batch % k == 0 and batch // k <= largest)
        advice.append(
            f"training.batch_size={batch // factor * gpus} "
            f"training.accumulation={accumulation * factor}"
        )
    advice += [
        _changes(layout, other) for other, most in others if other != layout and most >= batch
    ][:1]
    if not advice:
        smaller = [(most, other) for other, most in others if most]
        if smaller:
            most, other = max(smaller, key=lambda pair: pair[0])
            changes = f"{_changes(layout, other)} training.batch_size={most * gpus}"
            advice.append(changes.strip())
    if not advice:
        return (
            f"{sentence}; not even one sample a GPU fits in any mode: take more GPUs, "
            "training.moments=8bit, a LoRA critic or a smaller model"
        )
    return f"{sentence}; set {', or '.join(advice)}"


def _changes(old: Layout, new: Layout) -> str:
    """Overrides that lead from one layout to another."""
    changes = []
    if old.mode != new.mode:
        changes.append(f"parallel.mode={new.mode}")
    if old.sharded_teacher != new.sharded_teacher:
        changes.append(f"parallel.teacher={'sharded' if new.sharded_teacher else 'replicated'}")
    if old.checkpoint_blocks != new.checkpoint_blocks:
        changes.append(f"parallel.checkpoint_blocks={str(new.checkpoint_blocks).lower()}")
    return " ".join(changes)
