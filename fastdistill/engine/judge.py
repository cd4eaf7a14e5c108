"""`Judge`: draws a run's samples and says of them what means something, by the kind of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.config import Recipe
from fastdistill.data import Data
from fastdistill.diffusion import Noise
from fastdistill.engine import sampling
from fastdistill.engine.pictures import Pictures
from fastdistill.engine.report import REAL
from fastdistill.engine.sampling import Conditions
from fastdistill.engine.saved import DenoiserDescription
from fastdistill.engine.scores import scores_of
from fastdistill.engine.trainer import memory_in_use
from fastdistill.models import Denoiser


class Judge:
    """Samples of teacher and student from noise that no training step uses, and their scores.

    Every rank may call every method, as the networks may be sharded; one of them keeps the result.

    Args:
        recipe: the run's.
        data: gives the conditions, and real samples where it has some.
        description: of the teacher.
        device: where samples are made.
    """

    def __init__(
        self, recipe: Recipe, data: Data, description: DenoiserDescription, device: torch.device
    ) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        self.description = description
        pictures = Pictures(description, device)
        self.scores = scores_of(data, pictures, recipe.seed, recipe.data.name)

    def conditions(self, count: int) -> Conditions:
        """Classes in turn, or the first conditions in the data's order."""
        return conditions_of(
            self.description.classes, self.data, count, self.recipe.seed, self.device
        )

    def teacher_samples(self, teacher: Denoiser, count: int) -> Tensor:
        """Samples by the teacher's ODE  # [count, ...]"""
        settings = self.recipe.teacher
        return sampling.sample_teacher(
            teacher,
            settings.sampler_steps,
            self.conditions(count),
            count,
            self.description.shape,
            self._noise(),
            self.recipe.evaluation.batch_size,
            settings.guidance_scale,
        )

    def student_samples(self, student: Denoiser, count: int) -> Tensor:
        """Samples of a student in its few steps  # [count, ...]"""
        return sampling.sample_student(
            student,
            self.recipe.objective.student_times,
            self.conditions(count),
            count,
            self.description.shape,
            self._noise(),
            self.recipe.evaluation.batch_size,
        )

    def compare(
        self, teacher: Denoiser, student: Denoiser, scored: bool = True
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Numbers of teacher and student under plain names, and columns of a grid by title.

        Args:
            teacher: the teacher.
            student: the student.
            scored: whether samples are judged, which one rank does; all must make them.
        """
        recipe, steps = self.recipe, self.recipe.teacher.sampler_steps
        count, times = recipe.evaluation.samples, recipe.objective.student_times
        summary: dict[str, Any] = {
            "recipe": recipe.name,
            "seed": recipe.seed,
            "objective": recipe.objective.name,
            "divergence": getattr(recipe.objective, "divergence", None),
            "evaluations_teacher": 2 * steps - 1,
            "evaluations_student": len(times),
            **self.scores.facts(),
        }
        titles = {
            "teacher": f"teacher, {2 * steps - 1} evaluations",
            "student": f"student, {len(times)} evaluation" + "s" * (len(times) > 1),
        }
        makers: dict[str, Callable[[int], Tensor]] = {
            "teacher": lambda count: self.teacher_samples(teacher, count),
            "student": lambda count: self.student_samples(student, count),
        }
        if (rounds := self.scores.timing_rounds) is not None:
            seconds = sampling.seconds_per_thousand(makers, self.device, rounds)
        else:
            seconds = sampling.seconds_per_thousand(makers, self.device, rounds=1, count=count)
        columns = self.scores.real(count)
        for role, make in makers.items():
            made = make(count)
            scores = self.scores.drift(teacher, made, self.conditions(count).condition)
            scores |= self.scores.of(made) if scored else {}
            shared = {
                name: scores.pop(name)
                for name in (*REAL.values(), "samples", "frechet_samples")
                if name in scores
            }
            summary |= {f"{name}_{role}": value for name, value in scores.items()} | shared
            summary[f"seconds_per_thousand_{role}"] = seconds[role]
            columns[titles[role]] = made[: self.scores.shown]
        summary["speedup"] = seconds["teacher"] / seconds["student"]
        summary["peak_memory_gib"] = memory_in_use(self.device)
        return summary, columns

    def _noise(self) -> Noise:
        return Noise(self.recipe.seed, self.device).at(sampling.EVALUATION_STEP)


def conditions_of(
    classes: int, data: Data, count: int, seed: int, device: torch.device
) -> Conditions:
    """Conditions of ``count`` samples: classes in turn, or the first in a data set's order."""
    labels = sampling.balanced_labels(classes, count, device)
    if labels is not None:
        return Conditions(labels, torch.full_like(labels, classes))
    given = data.batch(seed, 0, count)
    return Conditions(given.condition, given.uncondition)
