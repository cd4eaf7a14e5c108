"""`Job`: a recipe from data to report, in a folder that can be resumed from any moment.

recipe.yaml        the whole recipe, defaults included
metrics.jsonl      everything measured at log points; a resumed run writes the same bytes
timings.jsonl      images a second and memory, which no two runs share
tensorboard/       the same as events
checkpoints/       the newest few of each stage
teacher/ student/  saved denoisers
samples/           grids during training
summary.json grid.png report.html    the result
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.config import Recipe, RecipeError, TrainingSettings, dump_recipe, load_recipe
from fastdistill.data import DATA_SETS
from fastdistill.diffusion import Noise
from fastdistill.engine import sampling
from fastdistill.engine.checkpoint import Checkpoint, CheckpointStore
from fastdistill.engine.folder import write_text
from fastdistill.engine.log import RunLog
from fastdistill.engine.report import REAL, write_report
from fastdistill.engine.saved import DenoiserDescription, load_denoiser, save_denoiser
from fastdistill.engine.trainer import Trainer, memory_in_use
from fastdistill.evaluate import DigitsClassifier, digits_classifier, evaluate_samples
from fastdistill.models import Denoiser
from fastdistill.objectives import (
    Denoising,
    Discriminator,
    DistributionMatching,
    MatchingSettings,
    Objective,
    get_divergence,
)
from fastdistill.parallel import Parallel, Ranks

STAGES = ("teacher", "distill")


def _silent(line: str) -> None:
    """What ranks other than the first say."""


class Job:
    """One run of a recipe in one folder.

    Under torchrun every process makes the same job; the first one alone writes and speaks.

    Args:
        folder: the run's folder, made by `create` or found by `open`; one for all processes.
        recipe: what is run.
        say: called with each line for the screen.
        ranks: the processes of the run; those that torchrun started if None.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        say: Callable[[str], None] = print,
        ranks: Ranks | None = None,
    ) -> None:
        self.folder, self.recipe = folder, recipe
        self.ranks = ranks or start_ranks(recipe)
        self.say = say if self.ranks.is_first else _silent
        self.device = self.ranks.device
        torch.set_num_threads(recipe.threads)
        self.data = DATA_SETS[recipe.data]().to(self.device)
        self.description = DenoiserDescription.of(recipe, self.data.shape, self.data.classes)

    @classmethod
    def create(
        cls,
        folder: Path,
        recipe: Recipe,
        say: Callable[[str], None] = print,
        ranks: Ranks | None = None,
    ) -> Job:
        """Start a run in a new or empty folder.

        Raises:
            FileExistsError: where the folder holds anything.
        """
        job = cls(folder, recipe, say, ranks)  # a recipe that cannot run here leaves nothing behind
        if job.ranks.is_first:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise FileExistsError(
                    f"{folder} is not empty; choose another --output, or continue the run in it "
                    f"with `fastdistill resume {folder}`"
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "recipe.yaml", dump_recipe(recipe))
        job.ranks.barrier()
        return job

    @classmethod
    def open(
        cls,
        folder: Path,
        say: Callable[[str], None] = print,
        overrides: Sequence[str] | None = None,
    ) -> Job:
        """Find the run in a folder.

        Args:
            folder: the run's folder.
            say: called with each line for the screen.
            overrides: keys that may differ from one machine to the next, as ``parallel.mode=fsdp``.

        Raises:
            RecipeError: where there is no run, or an override would make it another one.
        """
        path = folder / "recipe.yaml"
        if not path.is_file():
            raise RecipeError(f"{folder} holds no run: {path} is missing")
        for override in overrides or ():
            if not override.startswith(("parallel.", "device=", "threads=")):
                raise RecipeError(
                    f"override {override!r} would make this another run; a run that is continued "
                    "may change parallel.*, device and threads"
                )
        return cls(folder, load_recipe(path, overrides), say)

    def run(self) -> dict[str, Any] | None:
        """Do what is still to be done, from the newest intact checkpoint on.

        Returns:
            The summary, as in ``summary.json``, on the first rank.

        Raises:
            Interrupted: after a checkpoint, on Ctrl-C.
            BlockingIOError: where another process runs in the folder.
            RankLostError: where a process of the run died or does not answer.
        """
        with contextlib.ExitStack() as stack:
            log = None
            if self.ranks.is_first:
                stack.enter_context(self._locked())
                log = stack.enter_context(RunLog(self.folder, self.say))
            newest = self._store().newest()
            if newest is None and log is not None:
                log.restart(0)
            teacher = self._teacher(newest, log)
            student = self._distill(teacher, newest, log)
            return self._finish(teacher, student) if self.ranks.is_first else None

    def _teacher(self, newest: Checkpoint | None, log: RunLog | None) -> Denoiser:
        """The teacher: loaded, or trained in the stage of that name."""
        settings = self.recipe.teacher
        if settings.path is not None:
            saved = load_denoiser(settings.path, self.device)
            self._check_fits(saved.description, settings.path)
            return saved.denoiser
        folder = self.folder / "teacher"
        if newest is not None and newest.stage == "distill":
            return load_denoiser(folder, self.device).denoiser
        assert settings.training is not None
        denoiser = self.description.build(self.recipe.seed).to(self.device)
        objective = Denoising(denoiser, settings.law, condition_dropout=settings.condition_dropout)
        trainer = self._trainer("teacher", objective, settings.training, log)
        self._fit(trainer, newest, log)
        return self._save_averaged(trainer, folder, self.description)

    def _distill(
        self, teacher: Denoiser, newest: Checkpoint | None, log: RunLog | None
    ) -> Denoiser:
        """The student, an average of the weights of the distillation stage."""
        recipe = self.recipe
        objective = make_objective(recipe, teacher).to(self.device)
        parallel = self._parallel(objective)
        parallel.check_alike(objective.teacher)
        if recipe.parallel.teacher == "sharded" and parallel.mode != "single":
            parallel.shard(objective.teacher)
        trainer = self._trainer("distill", objective, recipe.training, log)
        self._fit(trainer, newest if newest and newest.stage == "distill" else None, log)
        times = recipe.objective.student_times
        description = self.description.model_copy(update={"times": times})
        return self._save_averaged(trainer, self.folder / "student", description)

    def _save_averaged(
        self, trainer: Trainer, folder: Path, description: DenoiserDescription
    ) -> Denoiser:
        """The trained student with averaged weights, whole, and saved."""
        weights = trainer.averaged_weights()
        denoiser = description.build().to(self.device)
        denoiser.load_state_dict(weights)
        if self.ranks.is_first:
            save_denoiser(folder, denoiser, description)
        self.ranks.barrier()
        return denoiser.requires_grad_(False).eval()

    def _parallel(self, objective: Objective) -> Parallel:
        settings, ranks = self.recipe.parallel, self.ranks
        mode = settings.mode
        if mode == "auto":
            mode = Parallel.fitting(ranks, objective.student)
        return Parallel(
            ranks, mode, settings.shards, settings.largest_unit, settings.resident_roles
        )

    def _trainer(
        self, stage: str, objective: Objective, settings: TrainingSettings, log: RunLog | None
    ) -> Trainer:
        if self.recipe.parallel.checkpoint_blocks:
            checkpoint_blocks(objective)
        if log is not None:
            log.begin(stage, settings)
        return Trainer(
            objective,
            self.data,
            settings,
            seed=self.recipe.seed,
            parallel=self._parallel(objective),
            checkpoints=self._store(settings.keep_checkpoints),
            stage=stage,
            on_log=None if log is None else lambda row: log.write(row, memory_in_use(self.device)),
            on_sample=lambda trainer: self._judge(trainer, log),
            before_checkpoint=None if log is None else log.commit,
        )

    def _fit(self, trainer: Trainer, checkpoint: Checkpoint | None, log: RunLog | None) -> None:
        if checkpoint is not None:
            attached = trainer.resume(checkpoint)
            if log is not None:
                log.restart(attached["metrics_bytes"], trainer.step)
            self.say(f"resuming stage {trainer.stage} at step {trainer.step}")
        trainer.fit()

    def _judge(self, trainer: Trainer, log: RunLog | None) -> None:
        """Evaluate the averaged student during training, and draw a few of its samples."""
        if trainer.stage != "distill":
            return
        count = self.recipe.evaluation.samples_during_training
        with trainer.averaged() as student:
            images = self._student_samples(student, count)
        if log is None:
            return
        scores = evaluate_samples(self.data.samples, images, self._classifier)
        log.write_scores(trainer.stage, trainer.step, scores)
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        path = folder / f"{trainer.stage}-{trainer.step:09d}.png"
        sampling.save_grid(path, [(f"step {trainer.step}", images)], 10, 10)

    def _finish(self, teacher: Denoiser, student: Denoiser) -> dict[str, Any]:
        """Evaluate teacher and student, and write summary, grid and report."""
        self.say("evaluating teacher and student")
        summary, images = self.evaluate(teacher, student)
        columns = [("real", self._real_by_class(100)), *images.items()]
        sampling.save_grid(self.folder / "grid.png", columns, 10, 10)
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_report(self.folder, self.recipe, summary)
        return summary

    def evaluate(
        self, teacher: Denoiser, student: Denoiser
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Numbers of teacher and student under plain names, and the images they were made from."""
        recipe, data = self.recipe, self.data
        count, steps = recipe.evaluation.samples, recipe.teacher.sampler_steps
        times = recipe.objective.student_times
        summary: dict[str, Any] = {
            "recipe": recipe.name,
            "seed": recipe.seed,
            "divergence": recipe.objective.divergence,
            "evaluations_teacher": 2 * steps - 1,
            "evaluations_student": len(times),
            "real_samples": len(data.samples),
        }
        titles = {
            "teacher": f"teacher, {2 * steps - 1} evaluations",
            "student": f"student, {len(times)} evaluation" + "s" * (len(times) > 1),
        }
        images = {}
        makers: dict[str, Callable[[int], Tensor]] = {
            "teacher": lambda count: self._teacher_samples(teacher, count),
            "student": lambda count: self._student_samples(student, count),
        }
        seconds = sampling.seconds_per_thousand(makers, self.device)
        for role, make in makers.items():
            made = make(count)
            scores = evaluate_samples(data.samples, made, self._classifier)
            shared = {
                name: scores.pop(name) for name in (*REAL.values(), "samples", "frechet_samples")
            }
            summary |= {f"{name}_{role}": value for name, value in scores.items()} | shared
            summary[f"seconds_per_thousand_{role}"] = seconds[role]
            images[titles[role]] = made[:100]
        summary["speedup"] = seconds["teacher"] / seconds["student"]
        summary["peak_memory_gib"] = memory_in_use(self.device)
        return summary, images

    def _teacher_samples(self, teacher: Denoiser, count: int) -> Tensor:
        labels = sampling.balanced_labels(self.data.classes, count, self.device)
        steps = self.recipe.teacher.sampler_steps
        return sampling.sample_teacher(
            teacher, steps, labels, count, self.data.shape, self._evaluation_noise()
        )

    def _student_samples(self, student: Denoiser, count: int) -> Tensor:
        labels = sampling.balanced_labels(self.data.classes, count, self.device)
        times = self.recipe.objective.student_times
        return sampling.sample_student(
            student, times, labels, count, self.data.shape, self._evaluation_noise()
        )

    def _evaluation_noise(self) -> Noise:
        return Noise(self.recipe.seed, self.device).at(sampling.EVALUATION_STEP)

    def _real_by_class(self, count: int) -> Tensor:
        """Real images in the order of the generated ones: classes in turn."""
        data = self.data
        if data.labels is None:
            return data.samples[:count]
        ranks = [torch.where(data.labels == k)[0] for k in range(data.classes)]
        rows = torch.stack([ranks[i % data.classes][i // data.classes] for i in range(count)])
        return data.samples[rows]

    @functools.cached_property
    def _classifier(self) -> DigitsClassifier:
        return digits_classifier()

    def _store(self, keep: int = 2) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints", STAGES, keep, self.say, self.ranks)

    def _check_fits(self, found: DenoiserDescription, path: Path) -> None:
        for name in ("shape", "classes", "model", "process", "parametrisation"):
            have, want = getattr(found, name), getattr(self.description, name)
            if have != want:
                raise RecipeError(f"teacher {path} has {name} {have}, but the recipe has {want}")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep a second process out of the folder."""
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(
                    error.errno, f"another process is running in {self.folder}"
                ) from None
            yield


def start_ranks(recipe: Recipe) -> Ranks:
    """The processes that torchrun started, or this one alone."""
    device = choose_device(recipe.device)
    return Ranks.start(str(device), recipe.parallel.timeout)


def checkpoint_blocks(objective: Objective) -> None:
    """Recompute activations in backward passes, in every trained network that can.

    Raises:
        RecipeError: for a network that cannot.
    """
    for denoiser in (objective.student, *objective.critic_modules().values()):
        if not isinstance(denoiser, Denoiser):
            continue
        if not hasattr(denoiser.network, "enable_gradient_checkpointing"):
            raise RecipeError(
                f"parallel.checkpoint_blocks: {type(denoiser.network).__name__} has no "
                "enable_gradient_checkpointing()"
            )
        denoiser.network.enable_gradient_checkpointing()


def make_objective(recipe: Recipe, teacher: Denoiser) -> DistributionMatching:
    """The recipe's objective, with student and critic that start as copies of the teacher."""
    settings = recipe.objective
    discriminator = None
    if settings.needs_discriminator:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed + 1)
            discriminator = Discriminator(teacher.network.feature_shapes)
    names = {field.name for field in dataclasses.fields(MatchingSettings)} - {"divergence"}
    shared = settings.model_dump(include=names)
    frozen = teacher
    if recipe.training.precision == "bfloat16" or recipe.parallel.teacher == "sharded":
        frozen = copy.deepcopy(teacher)  # the teacher itself is judged as it is
    if recipe.training.precision == "bfloat16":
        frozen.network.to(torch.bfloat16)
        frozen.input_dtype = torch.bfloat16
    return DistributionMatching(
        copy.deepcopy(teacher).requires_grad_(True).train(),
        frozen,
        copy.deepcopy(teacher).requires_grad_(True).train(),
        settings.student_times,
        settings.matching_law,
        settings.critic_law,
        discriminator=discriminator,
        settings=MatchingSettings(divergence=get_divergence(settings.divergence), **shared),
    )


def choose_device(name: str) -> torch.device:
    """The device of a recipe; auto is a GPU where there is one.

    Raises:
        RecipeError: for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs; use cpu, or "
            "install a CUDA build of torch"
        )
    return device
