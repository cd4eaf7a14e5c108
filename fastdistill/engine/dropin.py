"""`fastdistill.Trainer`: a distillation in five lines, each of whose parts can be replaced."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fastdistill.choices import RewardChoice
from fastdistill.config import OptimizerSettings, TrainingSettings
from fastdistill.diffusion import (
    EDM,
    VP,
    LogNormalSigma,
    Noise,
    Process,
    TimestepLaw,
    Uniform,
    few_step,
)
from fastdistill.engine.checkpoint import CheckpointStore
from fastdistill.engine.given import as_data, as_teacher, map_tensors
from fastdistill.engine.log import RunLog
from fastdistill.engine.rewards import make_reward
from fastdistill.engine.sampling import EVALUATION_STEP
from fastdistill.engine.trainer import Trainer as Loop
from fastdistill.engine.trainer import memory_in_use
from fastdistill.models import Condition, Denoiser
from fastdistill.objectives import METHODS, Discriminator, Method, Objective, Reward
from fastdistill.parallel import Parallel, Ranks

STAGE = "distill"


class Trainer:
    """Distils a teacher into a student of one or a few steps.

        trainer = fastdistill.Trainer("FOLDER", "dmd2", data="ENCODED", output="runs/first")
        trainer.fit()
        latents = trainer.sample(4)
        trainer.export("student")

    Under ``torchrun`` every process does the same, and the networks are spread over them. Where
    ``output`` has checkpoints, `fit` continues from the newest.

    Args:
        teacher: a pipeline of diffusers, its folder or its name on the Hub; a pair (model,
            scheduler) of diffusers; or a `Denoiser`.
        objective: a method of `fastdistill.objectives.METHODS` by its name in recipes, as dmd2, or
            an `Objective` with its own networks.
        data: a folder of images or one that ``fastdistill encode`` made; samples [n, ...] as the
            denoiser sees them, or a pair (samples, labels); a torch Dataset, or a DataLoader of one
            (see `fastdistill.data.dataset.DatasetData`); or an object that is `Data`.
        uncondition: the null condition for guidance, one row of each part, where neither data nor
            network have it: embeddings of the empty prompt.
        student_times: the student's times from the noisiest on, in the process' clock. If None one
            step: VP's last timestep, t = 1 of a flow, sigma = 2.5 of EDM.
        settings: steps, batch, optimizers, precision and intervals, instead of the next three.
        steps: critic updates; the student is updated with every fifth.
        batch_size: samples of an update, over all processes.
        lr: learning rate of student and critic.
        output: folder for checkpoints and logs; None writes none.
        device: where it runs; a GPU where there is one if None.
        seed: of every random number.
        parallel: single, resident or fsdp; what fits the processes if None.
        student: the student, where it is no copy of the teacher.
        critic: the critic, where it is no copy of the teacher.
        matching_law: law of the times at which scores are compared.
        critic_law: law of the critic's training times.
        say: called with each line for the screen.
        options: keys of the method that differ, as ``guidance_scale=7.5`` or
            ``divergence="forward_kl"``.

    Raises:
        ValueError: for what cannot be taken, and for options that do not fit together.
    """

    def __init__(
        self,
        teacher: Any,
        objective: str | Objective = "dmd2",
        data: Any = None,
        *,
        uncondition: Condition = None,
        student_times: Sequence[float] | None = None,
        settings: TrainingSettings | None = None,
        steps: int = 10_000,
        batch_size: int = 8,
        lr: float = 1e-5,
        output: Path | str | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        parallel: str | None = None,
        student: Denoiser | None = None,
        critic: Denoiser | None = None,
        matching_law: TimestepLaw | None = None,
        critic_law: TimestepLaw | None = None,
        say: Callable[[str], None] = print,
        **options: Any,
    ) -> None:
        self.ranks = Ranks.start(str(device or _best_device()))
        self.device = self.ranks.device
        self.say = say if self.ranks.is_first else _silent
        self.seed, self.output = seed, None if output is None else Path(output)
        given = as_teacher(teacher, self.device)
        self.teacher, self.source = given.denoiser.requires_grad_(False).eval(), given.source
        self.settings = settings or _settings(steps, batch_size, lr)
        if isinstance(objective, Objective):
            _refuse_beside_objective(options, student, critic, matching_law, critic_law)
            self.method: Method | None = None
            self.objective = objective.to(self.device)
        else:
            chosen = {"student_times": student_times, **options}
            chosen |= {"matching_law": matching_law, "critic_law": critic_law}
            self.method = make_method(objective, self.teacher.process, chosen)
            self.objective = self.method.build(self._networks(student, critic)).to(self.device)
        own_times = getattr(self.method or self.objective, "student_times", None)
        self.student_times = list(own_times or student_times or default_times(self.teacher.process))
        self.data = as_data(data, self.teacher, self.device, uncondition, self._is_guided)
        self._check_data()
        self._skeleton = _without_weights(self.objective.student)
        self._last: dict[str, Any] = {}
        self._log: RunLog | None = None
        self.loop = self._make_loop(parallel)

    def fit(self) -> Trainer:
        """Train to the last step, from the newest checkpoint in ``output`` on.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
            TrainingDivergedError: where no update between two log points was finite.
        """
        with contextlib.ExitStack() as stack:
            if self.output is not None and self.ranks.is_first:
                self.output.mkdir(parents=True, exist_ok=True)
                self._log = stack.enter_context(RunLog(self.output, self.say))
                self._log.begin(STAGE, self.settings)
            newest = None if self.loop.checkpoints is None else self.loop.checkpoints.newest()
            if newest is not None and self.loop.step == 0:
                attached = self.loop.resume(newest)
                if self._log is not None:
                    self._log.restart(attached["metrics_bytes"], self.loop.step)
                self.say(f"continuing at step {self.loop.step}")
            elif self._log is not None and self.loop.step == 0:
                self._log.restart(0)
            self.loop.fit()
        self._log = None
        return self

    @property
    def student(self) -> Denoiser:
        """The student with averaged weights, whole on every process, frozen, on the device."""
        student = copy.deepcopy(self._skeleton)
        state = self.loop.averaged_weights()
        student.load_state_dict(state, assign=True)
        return student.to(self.device).requires_grad_(False).eval()

    @torch.no_grad()
    def sample(
        self, count: int = 1, condition: Condition = None, *, seed: int = 0, batch: int = 64
    ) -> Tensor:
        """Samples of the averaged student, as the denoiser sees them  # [count, *shape]

        Args:
            count: number of samples.
            condition: of each sample; those of the data's first batch if None.
            seed: of the noise.
            batch: samples that are made together.
        """
        student = self.student
        if condition is None:
            condition = self.data.batch(self.seed, 0, count).condition
        noise = Noise(seed, self.device).at(EVALUATION_STEP)
        made = []
        for index in torch.arange(count, device=self.device).split(batch):
            own = map_tensors(functools.partial(_rows, index), condition)
            made.append(self._draw(student, own, noise, index))
        return torch.cat(made)

    def export(self, folder: Path | str, teacher: Path | str | None = None, **options: Any) -> Path:
        """Write the averaged student as a pipeline's folder of diffusers.

        Args:
            folder: the new folder.
            teacher: the teacher's pipeline, where the trainer was given none.
            options: of `fastdistill.engine.export.export_pipeline`.

        Raises:
            ValueError: what `export_pipeline` raises.
        """
        from fastdistill.engine.export import export_pipeline

        student, target = self.student, Path(folder)
        if self.ranks.is_first:
            recipe = yaml.safe_dump(self._describe(), sort_keys=False)
            about = {"recipe": recipe, "metrics": self._last}
            export_pipeline(
                student, self.student_times, teacher or self.source, target, **about | options
            )
        self.ranks.barrier()
        return target

    def _draw(self, student: Denoiser, condition: Condition, noise: Noise, index: Tensor) -> Tensor:
        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return student(x_t, t, condition)

        shape = self.data.shape
        times, start = self.student_times, student.start
        return few_step(denoise, student.process, times, noise, index, shape, start=start)

    def _networks(self, student: Denoiser | None, critic: Denoiser | None) -> GivenNetworks:
        teacher = frozen = self.teacher
        if self.settings.precision == "bfloat16":
            frozen = copy.deepcopy(teacher)
            frozen.network.to(torch.bfloat16)
            frozen.input_dtype = torch.bfloat16
        student = student or _trainable_copy(teacher)
        return GivenNetworks(
            student, frozen, self.settings, teacher, critic, self.seed, self.source
        )

    def _make_loop(self, mode: str | None) -> Loop:
        chosen: Any = mode or Parallel.fitting(self.ranks, self.objective.student)
        checkpoints = None
        if self.output is not None:
            checkpoints = CheckpointStore(
                *(self.output / "checkpoints", (STAGE,), self.settings.keep_checkpoints),
                *(self.say, self.ranks),
            )
        return Loop(
            self.objective,
            self.data,
            self.settings,
            seed=self.seed,
            parallel=Parallel(self.ranks, chosen),
            checkpoints=checkpoints,
            stage=STAGE,
            on_log=self._write,
            before_checkpoint=lambda: self._log.commit() if self._log is not None else {},
        )

    def _write(self, row: Mapping[str, Any]) -> None:
        self._last = {
            name: value
            for name, value in row.items()
            if isinstance(value, (int, float)) and name.count("/") < 2
        }
        if self._log is not None:
            self._log.write(row, memory_in_use(self.device))

    def _check_data(self) -> None:
        """Let the first batch say what the objective would miss in the middle of a step."""
        needs_real = getattr(self.objective, "discriminator", None) is not None
        if self.method is not None:
            needs_real = self.method.needs_real
        if needs_real and self.data.batch(self.seed, 0, 1).samples is None:
            raise ValueError(
                "the data hold conditions alone, but the objective learns from real samples: give "
                "some, or choose a data-free one, as objective='dmd'"
            )

    @property
    def _is_guided(self) -> bool:
        if self.method is not None:
            return self.method.needs_null
        return getattr(getattr(self.objective, "settings", None), "guidance_scale", 1) != 1

    def _describe(self) -> dict[str, Any]:
        """What was done, for the model card."""
        name = type(self.objective).__name__
        about: dict[str, Any]
        about = {"name": name} if self.method is None else self.method.model_dump(mode="json")
        about["student_times"] = self.student_times
        described: dict[str, Any] = {"teacher": self.source, "seed": self.seed, "objective": about}
        return described | {"training": self.settings.model_dump(mode="json")}


def default_times(process: Process) -> tuple[float, ...]:
    """One step from where the noise is highest; of EDM from SiD's sigma 2.5 (arXiv 2404.04057)."""
    if isinstance(process, EDM):
        return (2.5,)
    if isinstance(process, VP):
        return (float(process.steps - 1),)
    return (1.0,)


def default_law(process: Process) -> TimestepLaw:
    """DMD2's middle 96 % of the grid; of EDM the law that served best on the digits."""
    return LogNormalSigma(-0.5, 1.2) if isinstance(process, EDM) else Uniform(0.02, 0.98)


class GivenNetworks:
    """The networks of an objective that is given by name: copies of the teacher, or the user's."""

    def __init__(
        self,
        student: Denoiser,
        frozen: Denoiser,
        training: TrainingSettings,
        teacher: Denoiser,
        critic: Denoiser | None,
        seed: int,
        source: str | None,
    ) -> None:
        self.student, self.teacher, self.training = student, frozen, training
        self._whole, self._critic, self._seed, self._source = teacher, critic, seed, source

    def critic(self) -> Denoiser:
        return self._critic or _trainable_copy(self._whole)

    def discriminator(self) -> Discriminator:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + 1)
            return Discriminator(self.teacher.network.feature_shapes)

    def reward(self, choice: RewardChoice) -> Reward:
        return make_reward(choice, self._source, next(self.teacher.parameters()).device)


def make_method(name: str, process: Process, options: Mapping[str, Any]) -> Method:
    """A method by its name, with the usual times and laws of a process where none are given.

    Args:
        name: as in a recipe; diff-instruct is diff_instruct.
        process: of the teacher.
        options: keys of the method; those that are None count as not given.

    Raises:
        ValueError: for an unknown method or key, or values that do not fit together.
    """
    kinds = {kind.model_fields["name"].annotation.__args__[0]: kind for kind in METHODS}  # type: ignore[union-attr]
    kind = kinds.get(name.replace("-", "_"))
    if kind is None:
        raise ValueError(
            f"objective is {name!r}; expected one of {', '.join(kinds)}, or an Objective"
        )
    given = {key: value for key, value in options.items() if value is not None}
    wrong = sorted(set(given) - set(kind.model_fields))
    if wrong:
        known = sorted(set(kind.model_fields) - {"name"})
        raise ValueError(
            f"{wrong[0]} is no option of Trainer; options of the objective are {', '.join(known)}"
        )
    given.setdefault("student_times", default_times(process))
    law = given.get("matching_law", default_law(process))
    for key in ("matching_law", "critic_law"):
        if key in kind.model_fields and kind.model_fields[key].is_required():
            given.setdefault(key, law)
    return kind(name=name.replace("-", "_"), **given)


def _settings(steps: int, batch_size: int, lr: float) -> TrainingSettings:
    optimizer = OptimizerSettings(lr=lr, clip_norm=10.0)
    return TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        critic_updates_per_student_update=5,
        student=optimizer,
        critic=optimizer,
        discriminator=optimizer,
    )


def _refuse_beside_objective(options: Mapping[str, Any], *others: Any) -> None:
    if options or any(other is not None for other in others):
        raise ValueError(
            "objective has its own networks, laws and numbers; options, student, critic and laws "
            "are for an objective that is given by name"
        )


def _trainable_copy(teacher: Denoiser) -> Denoiser:
    return copy.deepcopy(teacher).requires_grad_(True).train()


def _without_weights(module: Denoiser) -> Denoiser:
    """A copy whose parameters and buffers have no memory, to be loaded into."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.to("meta"), requires_grad=False)
        for value in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _rows(index: Tensor, leaf: Tensor) -> Tensor:
    return leaf.to(index.device)[index]


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _silent(line: str) -> None:
    """What ranks other than the first say."""
