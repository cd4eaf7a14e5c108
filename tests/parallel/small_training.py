"""A distillation small enough for several processes on one machine, with every kind of weight."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.config import load_recipe
from fastdistill.data import InMemoryData
from fastdistill.engine.checkpoint import CheckpointStore
from fastdistill.engine.roles import checkpoint_blocks, make_objective
from fastdistill.engine.saved import DenoiserDescription
from fastdistill.engine.trainer import Trainer
from fastdistill.parallel import Mode, Parallel, Ranks

LARGEST_UNIT = 70_000  # the last block is a unit; tied weights and small parts are the root's

RECIPE = [
    "threads=1",
    "model.width=33",  # rows that 2 and 4 ranks cannot share equally
    "model.blocks=3",
    "objective.divergence=jensen_shannon",
    "objective.gan_weight=0.01",
    "training.batch_size=16",
    "training.critic_updates_per_student_update=5",
    "training.log_every=10",
    "training.ema_half_life=10",
    "training.student={lr: 1.0e-4, betas: [0.5, 0.99], clip_norm: 1.0}",
    "training.critic={lr: 1.0e-4, betas: [0.5, 0.99], clip_norm: 1.0}",
    "training.discriminator={lr: 1.0e-4, betas: [0.5, 0.99], clip_norm: 1.0}",
]


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a small distillation is run."""

    mode: Mode = "single"
    shards: int | None = None
    steps: int = 200
    overrides: tuple[str, ...] = ()
    resident_roles: tuple[str, ...] = ()
    shards_teacher: bool = False
    recomputes: bool = False


def make_trainer(ranks: Ranks, setup: Setup, folder: Path | None = None, **options: Any) -> Trainer:
    recipe = load_recipe("digits", [*RECIPE, f"training.steps={setup.steps}", *setup.overrides])
    generator = torch.Generator().manual_seed(1)
    data = InMemoryData(
        torch.rand(64, 1, 8, 8, generator=generator) * 2 - 1,
        torch.randint(10, (64,), generator=generator),
    )
    teacher = DenoiserDescription.of(recipe, data.shape, 10).build()
    with torch.no_grad():
        torch.nn.init.normal_(teacher.network.leave[1].weight, std=0.1, generator=generator)
    teacher.network.blocks[1].norm.weight = teacher.network.blocks[0].norm.weight  # tied
    objective = make_objective(recipe, teacher)
    for denoiser in (objective.student, objective.critic):
        denoiser.network.level.requires_grad_(False)
    parallel = Parallel(ranks, setup.mode, setup.shards, LARGEST_UNIT, setup.resident_roles)
    if setup.shards_teacher:
        parallel.shard(objective.teacher)
    if setup.recomputes:
        checkpoint_blocks(objective)
    store = folder and CheckpointStore(folder, ("distill",), keep=99, ranks=ranks)
    return Trainer(
        objective,
        data,
        recipe.training,
        parallel=parallel,
        checkpoints=store,
        stage="distill",
        **options,
    )


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, as whole tensors, by ``group/name``."""
    tensors, _ = trainer._state()
    return {
        f"{group}/{name}": getattr(value, "full_tensor", value.clone)()
        for group in tensors
        for name, value in tensors[group].items()
    }


def train(ranks: Ranks, setup: Setup) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Rows of the log, and the whole state at the end."""
    rows: list[dict[str, Any]] = []
    trainer = make_trainer(ranks, setup, on_log=rows.append)
    trainer.fit()
    return rows, whole_state(trainer)
