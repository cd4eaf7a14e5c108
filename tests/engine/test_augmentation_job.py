"""Runs with ScoreAug: for the teacher, told what was drawn, and for the critic, which is not."""

from __future__ import annotations

import pytest
from small import small_recipe

from fastdistill.engine.job import Job
from fastdistill.engine.trainer import Trainer

AUGMENTED = [
    "model.omega=true",
    "teacher.augmentation={flip: true, rotation: true, brightness: 0.2, conditioned: true}",
    "teacher.training.steps=6",
    "objective.critic_augmentation={translation: 0.2, cutout: 0.3}",
    "training.steps=8",
    "training.sample_every=null",
    "training.checkpoint_every=3",
    "evaluation.samples=100",
]


class Stopped(Exception):
    pass


def test_a_run_that_is_stopped_and_resumed_draws_the_same_transformations(tmp_path, monkeypatch):
    recipe = small_recipe(*AUGMENTED)
    Job.create(tmp_path / "whole", recipe, lambda line: None).run()
    update = Trainer.update

    def stop(trainer: Trainer) -> None:
        update(trainer)
        if (trainer.stage, trainer.step) in (("teacher", 4), ("distill", 5)):
            raise Stopped

    monkeypatch.setattr(Trainer, "update", stop)
    with pytest.raises(Stopped):
        Job.create(tmp_path / "stopped", recipe, lambda line: None).run()
    monkeypatch.setattr(Trainer, "update", update)
    Job.open(tmp_path / "stopped", lambda line: None).run()
    for name in ("metrics.jsonl", "teacher/model.safetensors", "student/model.safetensors"):
        written = [(tmp_path / run / name).read_bytes() for run in ("whole", "stopped")]
        assert written[0] == written[1], name


def test_samples_that_cannot_be_transformed_are_refused_before_a_folder_is_made(tmp_path):
    recipe = small_recipe("objective.critic_augmentation={cutout: 0.3}")
    wrong = recipe.objective.critic_augmentation.model_copy(update={"rotation": True})
    objective = recipe.objective.model_copy(update={"critic_augmentation": wrong})
    recipe = recipe.model_copy(update={"objective": objective})
    from fastdistill.engine import inputs

    class Wide:
        def __init__(self, images) -> None:
            self.images, self.shape, self.classes = images, (1, 8, 4), images.classes

        def to(self, device):
            return self

    digits = inputs.digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "digits", lambda: Wide(digits()))
        with pytest.raises(ValueError, match="rotation is for square pictures"):
            Job.create(tmp_path / "run", recipe, lambda line: None)
    assert not (tmp_path / "run").exists()
