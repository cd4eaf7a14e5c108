"""`Job`: a recipe from data to report, in a folder that can be resumed from any moment.

recipe.yaml        the whole recipe, defaults included
metrics.jsonl      everything measured at log points; a resumed run writes the same bytes
timings.jsonl      images a second and memory, which no two runs share
tensorboard/       the same as events
checkpoints/       the newest few of each stage
teacher/ student/  saved denoisers; warmup/ and pairs/ where there is a warm-up
nodes/             the path that objective backtracking goes back
samples/           grids during training
summary.json grid.png report.html    the result
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdistill.config import (
    Recipe,
    RecipeError,
    TrainingSettings,
    WarmupSettings,
    dump_recipe,
    load_recipe,
)
from fastdistill.data import Data
from fastdistill.engine.checkpoint import Checkpoint, CheckpointStore
from fastdistill.engine.devices import choose_device
from fastdistill.engine.folder import write_text
from fastdistill.engine.gaussian import stand_in_report
from fastdistill.engine.inputs import open_data, own_data
from fastdistill.engine.judge import Judge
from fastdistill.engine.log import RunLog
from fastdistill.engine.metrics import finite
from fastdistill.engine.nodes import NodeFolder
from fastdistill.engine.pairs import PairData
from fastdistill.engine.report import write_report
from fastdistill.engine.roles import (
    RunNetworks,
    checkpoint_blocks,
    describe_student,
    load_teacher,
    make_frozen,
    make_student,
)
from fastdistill.engine.saved import (
    DenoiserDescription,
    SavedDenoiser,
    load_denoiser,
    load_weights,
    save_denoiser,
)
from fastdistill.engine.trainer import Trainer, memory_in_use
from fastdistill.models import Denoiser
from fastdistill.objectives import (
    BacktrackingMethod,
    Degradation,
    Denoising,
    KnowledgeDistillation,
    Objective,
)
from fastdistill.optim.transfer import checksums
from fastdistill.parallel import Parallel, Ranks

STAGES = ("teacher", "warmup", "degradation", "distill")


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
        self._check_batches()
        self._loaded: SavedDenoiser | None = None
        self._teacher_sum: int | None = None
        if recipe.model.name != "pretrained":
            own = own_data(recipe, self.device)
            self.data: Data = own
            self.description = DenoiserDescription.of(recipe, own.shape, own.classes)
        if recipe.teacher.training is None:
            self._loaded = load_teacher(recipe, self.device)
            self.description = self._loaded.description
        if self._loaded is not None and recipe.model.name == "pretrained":
            self.data = open_data(recipe, self._loaded, self.device)
        for augmentation in recipe.augmentations.values():
            augmentation.check_shape(self.description.shape)
        self.judge = Judge(recipe, self.data, self.description, self.device)

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
            if self.recipe.teacher.training is not None:
                self._train_teacher(newest, log)
            start = self._warm_up(newest, log)
            return self._distill(start, self._degrade(start, newest, log), newest, log)

    def evaluate(self) -> dict[str, Any]:
        """Numbers of the run's teacher and saved student, under plain names."""
        student = load_denoiser(self.folder / "student", self.device).denoiser
        return self.judge.compare(make_frozen(self.recipe, self._take_teacher()), student)[0]

    def _train_teacher(self, newest: Checkpoint | None, log: RunLog | None) -> None:
        """The stage of a teacher that is not given."""
        settings = self.recipe.teacher
        if newest is not None and newest.stage != "teacher":
            return
        assert settings.training is not None
        denoiser = self.description.build(self.recipe.seed).to(self.device)
        objective = Denoising(
            denoiser,
            settings.law,
            condition_dropout=settings.condition_dropout,
            augmentation=settings.augmentation,
        )
        trainer = self._trainer("teacher", objective, settings.training, log)
        self._fit(trainer, newest, log)
        self._save_averaged(trainer, self.folder / "teacher", self.description)

    def _warm_up(self, newest: Checkpoint | None, log: RunLog | None) -> Path | None:
        """The saved student that the distillation starts at; it is the teacher's copy if None."""
        recipe, settings = self.recipe, self.recipe.warmup
        if settings is None:
            return Path(recipe.start) if recipe.start else None
        folder = self.folder / "warmup"
        if _is_at_most(newest, "warmup"):
            teacher = self._take_teacher()
            frozen = make_frozen(recipe, teacher)
            student = make_student(recipe, teacher, frozen)
            del teacher
            self._prepare(frozen, student)
            pairs = self._pairs(settings)
            pairs.make(
                frozen,
                recipe.teacher.sampler_steps,
                recipe.teacher.guidance_scale,
                self.ranks,
                self.say,
            )
            del frozen
            objective = KnowledgeDistillation(student, recipe.objective.student_times[0])
            trainer = self._trainer("warmup", objective, settings.training, log, pairs)
            self._fit(trainer, newest if newest and newest.stage == "warmup" else None, log)
            self._save_averaged(trainer, folder, self._student_description())
        return folder

    def _degrade(
        self, start: Path | None, newest: Checkpoint | None, log: RunLog | None
    ) -> NodeFolder | None:
        """The path from the teacher to the initial student, where the objective goes it back."""
        recipe, settings = self.recipe, self.recipe.degradation
        method = recipe.objective
        if settings is None or not isinstance(method, BacktrackingMethod):
            return None
        nodes = NodeFolder(self.folder / "nodes", settings.nodes, settings.rank)
        if not _is_at_most(newest, "degradation"):
            return nodes
        teacher = self._take_teacher()
        generator = make_frozen(recipe, teacher)
        if start is not None:
            load_weights(start, generator)
        if self.ranks.is_first:
            nodes.save(0, teacher.network.state_dict(), self.say)
        law = method.critic_law
        copy = teacher.requires_grad_(True).train()
        objective = Degradation(copy, generator, method.student_times, law)
        self._prepare(generator, copy)
        apart = settings.training.steps // settings.nodes
        training = settings.training.model_copy(update={"sample_every": apart})

        def keep(trainer: Trainer) -> None:
            weights = trainer.weights()
            if self.ranks.is_first:
                named = {name.removeprefix("network."): value for name, value in weights.items()}
                nodes.save(trainer.step // apart, named, self.say)

        trainer = self._trainer("degradation", objective, training, log, on_sample=keep)
        self._fit(trainer, newest if newest and newest.stage == "degradation" else None, log)
        self.ranks.barrier()
        return nodes

    def _distill(
        self,
        start: Path | None,
        path: NodeFolder | None,
        newest: Checkpoint | None,
        log: RunLog | None,
    ) -> dict[str, Any] | None:
        """The stage of the distillation, and what it made."""
        recipe = self.recipe
        networks = RunNetworks(recipe, self._take_teacher(), start, path)
        objective = recipe.objective.build(networks).to(self.device)
        self._prepare(networks.teacher, objective.student)
        trainer = self._trainer("distill", objective, recipe.training, log)
        self._fit(trainer, newest if newest and newest.stage == "distill" else None, log)
        self._save_averaged(trainer, self.folder / "student", self._student_description())
        self.say("evaluating teacher and student")
        with trainer.averaged() as student:
            summary, columns = self.judge.compare(
                networks.teacher, student, scored=self.ranks.is_first
            )
        stand_in = getattr(objective, "stand_in", None)
        if stand_in is not None:
            scale = recipe.objective.guidance_scale
            summary |= stand_in_report(stand_in, networks.teacher, self.data, recipe.seed, scale)
        if not self.ranks.is_first:
            return None
        self.judge.scores.draw(self.folder / "grid.png", columns)
        write_text(self.folder / "summary.json", json.dumps(finite(summary), indent=2) + "\n")
        write_report(self.folder, recipe, summary)
        return summary

    def _prepare(self, teacher: Denoiser, student: Denoiser) -> None:
        """Make sure that all ranks hold the same teacher, and shard it where the recipe says so."""
        parallel = self._parallel(student)
        parallel.check_alike(teacher)
        self._teacher_sum = zlib.crc32(json.dumps(checksums(teacher)).encode())
        if self.recipe.parallel.teacher == "sharded" and parallel.mode != "single":
            parallel.shard(teacher)

    def _pairs(self, settings: WarmupSettings) -> PairData:
        size = settings.training.batch_size
        batches = -(-settings.pairs // size)
        folder = self.folder / "pairs"
        return PairData(folder, self.data, self.recipe.seed, size, batches, self.device)

    def _take_teacher(self) -> Denoiser:
        """The teacher in float32, for the caller alone: it is loaded again for the next."""
        if self._loaded is not None:
            denoiser, self._loaded = self._loaded.denoiser, None
            return denoiser
        if self.recipe.teacher.path is None:
            return load_denoiser(self.folder / "teacher", self.device).denoiser
        return load_teacher(self.recipe, self.device).denoiser

    def _student_description(self) -> DenoiserDescription:
        return describe_student(self.recipe, self.description)

    def _save_averaged(
        self, trainer: Trainer, folder: Path, description: DenoiserDescription
    ) -> None:
        """Save the trained network with averaged weights, whole."""
        weights = trainer.averaged_weights()
        two_times = trainer.objective.student.two_times
        description = description.model_copy(update={"two_times": two_times})
        if self.ranks.is_first:
            named = {name.removeprefix("network."): value for name, value in weights.items()}
            save_denoiser(folder, named, description, trainer.objective.student.start)
        self.ranks.barrier()

    def _parallel(self, student: Denoiser) -> Parallel:
        settings, ranks = self.recipe.parallel, self.ranks
        mode = settings.mode
        if mode == "auto":
            mode = Parallel.fitting(ranks, student)
        return Parallel(
            ranks, mode, settings.shards, settings.largest_unit, settings.resident_roles
        )

    def _trainer(
        self,
        stage: str,
        objective: Objective,
        settings: TrainingSettings,
        log: RunLog | None,
        data: Data | None = None,
        on_sample: Callable[[Trainer], None] | None = None,
    ) -> Trainer:
        if self.recipe.parallel.checkpoint_blocks:
            checkpoint_blocks(objective)
        if log is not None:
            log.begin(stage, settings)
        return Trainer(
            objective,
            data or self.data,
            settings,
            seed=self.recipe.seed,
            parallel=self._parallel(objective.student),
            checkpoints=self._store(settings.keep_checkpoints),
            stage=stage,
            on_log=None if log is None else lambda row: log.write(row, memory_in_use(self.device)),
            on_sample=on_sample or (lambda trainer: self._judge(trainer, log)),
            before_checkpoint=None if log is None else lambda: self._attach(log),
        )

    def _fit(self, trainer: Trainer, checkpoint: Checkpoint | None, log: RunLog | None) -> None:
        if checkpoint is not None:
            attached = trainer.resume(checkpoint)
            if attached["teacher"] != self._teacher_sum:
                place = self.recipe.teacher.path or self.folder / "teacher"
                raise RecipeError(
                    f"teacher {place} has other weights than when {checkpoint.path} was written; "
                    "put the old ones back, or begin a new run"
                )
            if log is not None:
                log.restart(attached["metrics_bytes"], trainer.step)
            self.say(f"resuming stage {trainer.stage} at step {trainer.step}")
        trainer.fit()

    def _attach(self, log: RunLog) -> dict[str, Any]:
        """What a checkpoint keeps besides the trainer's own."""
        return log.commit() | {"teacher": self._teacher_sum}

    def _judge(self, trainer: Trainer, log: RunLog | None) -> None:
        """Evaluate the averaged student during the distillation, and draw a few of its samples."""
        count = self.recipe.evaluation.samples_during_training
        with trainer.averaged() as student:
            samples = self.judge.student_samples(student, count)
        if log is None:
            return
        scores = self.judge.scores.of(samples)
        if scores:
            log.write_scores(trainer.stage, trainer.step, scores)
        path = self.folder / "samples" / f"{trainer.stage}-{trainer.step:09d}.png"
        self.judge.scores.draw(path, {f"step {trainer.step}": samples})

    def _check_batches(self) -> None:
        """Make sure that the ranks can share every stage's batches, before anything is loaded."""
        recipe, size = self.recipe, self.ranks.size
        stages = {
            "teacher.training": recipe.teacher.training,
            "warmup.training": recipe.warmup.training if recipe.warmup else None,
            "degradation.training": recipe.degradation.training if recipe.degradation else None,
            "training": recipe.training,
        }
        for key, stage in stages.items():
            if stage is not None and stage.batch_size % size:
                raise RecipeError(
                    f"{key}.batch_size is {stage.batch_size}, which {size} ranks cannot share "
                    "equally; choose a multiple"
                )

    def _store(self, keep: int = 2) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints", STAGES, keep, self.say, self.ranks)

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


def _is_at_most(newest: Checkpoint | None, stage: str) -> bool:
    """Whether a run whose newest checkpoint this is has still to do a stage, or to finish it."""
    return newest is None or STAGES.index(newest.stage) <= STAGES.index(stage)


def start_ranks(recipe: Recipe) -> Ranks:
    """The processes that torchrun started, or this one alone."""
    device = choose_device(recipe.device)
    return Ranks.start(str(device), recipe.parallel.timeout)
