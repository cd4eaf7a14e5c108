"""LoRA students and critics in the trainer: what checkpoints hold, and what resumes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import Prompts, objective_of, tiny_denoiser

from fastdistill.config import OptimizerSettings, TrainingSettings
from fastdistill.engine.checkpoint import CheckpointStore
from fastdistill.engine.trainer import Trainer
from fastdistill.models.lora import add_lora, shared_lora_critic


def trainer_of(folder: Path, family: str, precision: str, steps: int, shared: bool) -> Trainer:
    """A LoRA student and a LoRA critic, of its own or on the teacher's weights."""
    teacher = tiny_denoiser(family)
    if precision == "bfloat16":
        teacher.network.to(torch.bfloat16)
        teacher.input_dtype = torch.bfloat16
    student = copy.deepcopy(teacher)
    add_lora(student.network, rank=2)
    if shared:
        critic = shared_lora_critic(teacher, rank=2)
    else:
        critic = copy.deepcopy(teacher)
        add_lora(critic.network, rank=2)
    torch.manual_seed(4)
    objective = objective_of(teacher, student, critic, True, "reverse_kl")
    optimizer = OptimizerSettings(lr=1e-2)
    settings = TrainingSettings(
        steps=steps, batch_size=4, critic_updates_per_student_update=2, log_every=2,
        checkpoint_every=2, precision=precision, student=optimizer, critic=optimizer,
        discriminator=optimizer,
    )  # fmt: skip
    store = CheckpointStore(folder, ("distill",), keep=9)
    return Trainer(objective, Prompts(teacher), settings, checkpoints=store, stage="distill")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [True, False])
def test_lora_checkpoints_hold_what_was_trained_and_resume_bitwise(tmp_path, shared, precision):
    whole = trainer_of(tmp_path / "whole", "sdxl", precision, 4, shared)
    before = dict(whole._untrained)
    whole.fit()
    saved = whole._state()[0]["networks"]
    assert saved
    assert all("lora_" in k or "updates" in k or "discriminator" in k for k in saved)
    assert all(torch.equal(value, before[name]) for name, value in whole._untrained.items())
    half = trainer_of(tmp_path / "half", "sdxl", precision, 4, shared)
    while half.step < 2:
        half.update()
    half.save()
    half.checkpoints.wait()
    again = trainer_of(tmp_path / "half", "sdxl", precision, 4, shared)
    newest = again.checkpoints.newest()
    assert newest is not None
    again.resume(newest)
    again.fit()
    for name, value in again._state()[0]["networks"].items():
        assert torch.equal(value, saved[name]), name
    weights = again.averaged_weights()
    fresh = copy.deepcopy(again.objective.student)
    fresh.load_state_dict(weights)  # whole, with its base


def test_every_weight_of_a_lora_student_moved(tmp_path):
    trainer = trainer_of(tmp_path, "sdxl", "float32", 6, True)
    arenas = trainer.arenas
    before = {role: arena.whole("parameter") for role, arena in arenas.items()}
    trainer.fit()
    for role, arena in arenas.items():
        moved = [bool((v != before[role][k]).any()) for k, v in arena.whole("parameter").items()]
        assert sum(moved) > 0.9 * len(moved), role
