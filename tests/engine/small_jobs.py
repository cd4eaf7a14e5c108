"""The recipes that ship, each cut down to a few steps on a small teacher of its architecture."""

from __future__ import annotations

from pathlib import Path

import small_teachers

from fastdistill.config import Recipe, load_recipe

RECIPES = {
    "sdxl_fdistill": "sdxl",
    "sdxl_dmd2_1step": "sdxl",
    "sdxl_dmd2_4step": "sdxl",
    "sd15_dmd2": "sd15",
    "pixart_sim": "pixart",
    "dit_xl2_256": "dit",
    "dit_xl2_512": "dit",
    "sd3_medium": "sd3",
    "edm_cifar10": "edm",
    "edm_imagenet64": "edm_classes",
}
"""Recipe, and the kind of its teacher."""

SMALL = [
    "threads=1",
    "device=cpu",
    "model.config=null",
    "teacher.sampler_steps=2",
    "training.steps=6",
    "training.batch_size=4",
    "training.log_every=3",
    "training.sample_every=3",
    "training.checkpoint_every=2",
    "training.precision=float32",
    "training.critic_updates_per_student_update=2",
    "training.student.lr=1.0e-3",
    "training.student.warmup=0",
    "training.critic.lr=1.0e-3",
    "training.critic.warmup=0",
    "evaluation={samples: 4, samples_during_training: 4, batch_size: 3}",
]
WARMUP = [
    "warmup.pairs=10",
    "warmup.training.steps=4",
    "warmup.training.batch_size=4",
    "warmup.training.checkpoint_every=2",
    "warmup.training.log_every=2",
    "warmup.training.precision=float32",
    "warmup.training.student.warmup=0",
    "warmup.training.student.lr=1.0e-3",
]


def overrides(name: str, folder: Path) -> list[str]:
    """What makes a recipe small, with a teacher and data made in the folder where they are not."""
    kind = RECIPES[name]
    teacher, data = folder / kind, folder / f"{kind}-data"
    if not teacher.exists():
        small_teachers.save_teacher(kind, teacher, vae=kind == "sdxl")
        small_teachers.save_data(kind, data)
    chosen = [*SMALL, *(WARMUP if name == "sdxl_dmd2_1step" else ()), f"teacher={teacher}"]
    if name.startswith("edm"):  # images and their encoded form are one to the job
        chosen += [f"data={{name: encoded, path: {data}}}"]
    elif not name.startswith("dit"):
        chosen += [f"data={data}"]
    if load_recipe(name).training.discriminator is not None:
        chosen += ["training.discriminator.lr=1.0e-3", "training.discriminator.warmup=0"]
    return chosen


def small_job(name: str, folder: Path, *more: str) -> Recipe:
    return load_recipe(name, [*overrides(name, folder), *more])
