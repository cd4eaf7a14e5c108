"""A run small enough for tests: the digits recipe with few steps."""

from __future__ import annotations

from fastdistill.config import Recipe, load_recipe

SMALL = [
    "threads=1",
    "model.width=32",
    "model.blocks=2",
    "teacher.training.steps=30",
    "teacher.training.batch_size=32",
    "teacher.training.log_every=7",
    "teacher.training.checkpoint_every=10",
    "teacher.training.student.warmup=5",
    "teacher.sampler_steps=4",
    "training.steps=40",
    "training.batch_size=32",
    "training.critic_updates_per_student_update=2",
    "training.log_every=7",
    "training.sample_every=20",
    "training.checkpoint_every=8",
    "training.student.warmup=5",
    "training.critic.warmup=5",
    "evaluation.samples=200",
    "evaluation.samples_during_training=100",
]


def small_recipe(*overrides: str) -> Recipe:
    return load_recipe("digits", [*SMALL, *overrides])
