"""`Trainer`: one stage of training, as a loop to read in a sitting.

A step is one critic update (and, every ``critic_updates_per_student_update`` steps, one student
update on the same samples). Between two log points nothing waits for the device: metrics stay in a
`MetricBuffer`, non-finite updates are skipped on the device, and every random number is a function
of the seed and the step, so that a resumed run is bitwise the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.config import OptimizerSettings, TrainingSettings
from fastdistill.data import InMemoryData
from fastdistill.diffusion import Noise
from fastdistill.engine.checkpoint import Checkpoint, CheckpointStore
from fastdistill.engine.folder import read_document
from fastdistill.engine.metrics import MetricBuffer
from fastdistill.engine.shards import read_tensors
from fastdistill.objectives import Batch, Objective
from fastdistill.optim import EMA, OptimizerStep


class Interrupted(Exception):
    """Training stopped by Ctrl-C or SIGTERM, after a checkpoint was written."""


class TrainingDivergedError(RuntimeError):
    """No finite update between two log points."""


class Trainer:
    """Trains the networks of an objective; works alone, in anybody's script.

    Args:
        objective: what is trained, already on its device.
        data: real samples and their conditions, on the same device.
        settings: steps, batch, optimizers and intervals.
        seed: seed of every random number.
        checkpoints: where checkpoints go; None makes none.
        stage: name of this stage in checkpoints and logs.
        on_log: called at each log point with a row of plain numbers.
        on_sample: called every ``sample_every`` steps with the trainer; what it returns is logged.
        before_checkpoint: called before each checkpoint; what it returns is kept in it, as the
            length of the log, and is found in ``resumed`` after `resume`.
    """

    def __init__(
        self,
        objective: Objective,
        data: InMemoryData,
        settings: TrainingSettings,
        *,
        seed: int = 0,
        checkpoints: CheckpointStore | None = None,
        stage: str = "train",
        on_log: Callable[[dict[str, Any]], None] | None = None,
        on_sample: Callable[[Trainer], None] | None = None,
        before_checkpoint: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.objective, self.data, self.settings = objective, data, settings
        self.seed, self.stage, self.checkpoints = seed, stage, checkpoints
        self.on_log, self.on_sample = on_log, on_sample
        self.before_checkpoint = before_checkpoint
        self.device = next(objective.student.parameters()).device
        self.step = 0
        self.noise = Noise(seed, self.device)
        self.ema = EMA(objective.student, settings.ema_half_life)
        self.optimizers = self._make_optimizers()
        self.metrics = MetricBuffer(self.device, objective.noise_bins)
        rows = settings.accumulation * settings.batch_size
        self._index = torch.arange(rows, device=self.device).chunk(settings.accumulation)
        self._stop = False

    @property
    def ratio(self) -> int:
        """Critic updates for each student update; 1 without a critic."""
        return self.settings.critic_updates_per_student_update if self.objective.has_critic else 1

    @property
    def student_updates(self) -> int:
        """Student updates done so far."""
        return self.step // self.ratio

    def fit(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after a checkpoint.
            TrainingDivergedError: where no update between two log points was finite.
            OSError: where a checkpoint cannot be written; those before it are untouched.
        """
        settings = self.settings
        with self._stopping_on_signals():
            while self.step < settings.steps:
                self.update()
                last = self.step == settings.steps
                if last or self.step % settings.log_every == 0:
                    self._log()
                if settings.sample_every and (last or self.step % settings.sample_every == 0):
                    self._sample()
                if last or self._stop or self.step % settings.checkpoint_every == 0:
                    self.save()
                if self._stop and not last:
                    break
            if self.checkpoints is not None:
                self.checkpoints.wait()
        if self.step < settings.steps:
            raise Interrupted(f"stopped in stage {self.stage} at step {self.step}")

    def update(self) -> None:
        """One step: accumulate the cotangents of every micro-batch, then move the weights."""
        objective, has_critic = self.objective, self.objective.has_critic
        student_turn = (self.step + 1) % self.ratio == 0
        self.noise.at(self.step)
        for micro in range(self.settings.accumulation):
            batch = self._batch(micro)
            with self._precision(), torch.set_grad_enabled(student_turn):
                sample = objective.generate(batch)
            if student_turn:
                self._accumulate("student", objective.student_update, batch, sample)
            if has_critic:
                self._accumulate("critic", objective.critic_update, batch, sample.detach())
        if student_turn:
            result = self.optimizers["student"].step(self.student_updates)
            self.ema.update(self.student_updates, moved=1 - result["skipped"])
            self.metrics.add("student", result)
        for role in objective.critic_modules():
            self.metrics.add(role, self.optimizers[role].step(self.step))
        self.step += 1

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        if self.checkpoints is None:
            return
        tensors = {
            "networks": self.objective.state_dict(),
            "ema": self.ema.module.state_dict(),
            "metrics": self.metrics.state_dict(),
        } | {f"optimizer-{role}": step.state_dict() for role, step in self.optimizers.items()}
        document = {"stage": self.stage, "step": self.step, "seed": self.seed}
        if self.before_checkpoint is not None:
            document["attached"] = self.before_checkpoint()
        self.checkpoints.save(self.stage, self.step, tensors, {"state": document})

    def resume(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Continue from a verified checkpoint of this stage.

        Returns:
            What ``before_checkpoint`` attached to it.

        Raises:
            ValueError: for a checkpoint of another stage, seed or architecture.
        """
        state = read_document(checkpoint.path, "state")
        if (state["stage"], state["seed"]) != (self.stage, self.seed):
            raise ValueError(
                f"{checkpoint.path} is of stage {state['stage']} and seed {state['seed']}; this "
                f"run is in stage {self.stage} with seed {self.seed}"
            )
        try:
            self.objective.load_state_dict(read_tensors(checkpoint.path, "networks"))
            self.ema.module.load_state_dict(read_tensors(checkpoint.path, "ema"))
        except RuntimeError as error:
            raise ValueError(f"{checkpoint.path} is of other networks: {error}") from error
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(read_tensors(checkpoint.path, f"optimizer-{role}"))
        self.metrics.load_state_dict(read_tensors(checkpoint.path, "metrics"))
        self.step = state["step"]
        return state.get("attached", {})

    def _accumulate(
        self, role: str, make: Callable[..., Any], batch: Batch, sample: Tensor
    ) -> None:
        """Add one micro-batch's gradients for a role, and its metrics."""
        with self._precision():
            update = make(batch, sample)
        update.backward(self._trained[role])
        self.metrics.add(role, update.metrics)
        if update.by_level:
            chosen = {name: update.metrics[name] for name in update.by_level}
            self.metrics.add_by_level(role, chosen, update.noise_bin)

    def _batch(self, micro: int) -> Batch:
        settings, index = self.settings, self._index[micro]
        real = self.data.batch(
            self.seed, self.step * settings.accumulation + micro, settings.batch_size
        )
        null = None if real.labels is None else torch.full_like(real.labels, self.data.classes)
        scale = 1 / (settings.batch_size * settings.accumulation)
        return Batch(index, self.noise, scale, self.data.shape, real.samples, real.labels, null)

    def _make_optimizers(self) -> dict[str, OptimizerStep]:
        modules: dict[str, nn.Module] = {"student": self.objective.student}
        modules |= self.objective.critic_modules()
        steps = {}
        for role, module in modules.items():
            options: OptimizerSettings | None = getattr(self.settings, role)
            if options is None:
                raise ValueError(f"settings.{role} is None, but the objective trains a {role}")
            updates = (
                self.settings.steps // self.ratio if role == "student" else self.settings.steps
            )
            steps[role] = OptimizerStep(module, updates=updates, **dict(options))
        critics = [step.parameters for role, step in steps.items() if role != "student"]
        self._trained = {
            "student": steps["student"].parameters,
            "critic": [value for parameters in critics for value in parameters],
        }
        return steps

    def _precision(self) -> contextlib.AbstractContextManager:
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _log(self) -> None:
        """Read the metrics: the one moment at which the host waits for the device."""
        means = self.metrics.read()
        row = {"stage": self.stage, "step": self.step, "student_updates": self.student_updates}
        if means.get("student/skipped") == 1.0:
            raise TrainingDivergedError(
                f"stage {self.stage}: no update of the student up to step {self.step} had a finite "
                "gradient; lower the learning rate, or look for nan in the data and the teacher"
            )
        if self.on_log is not None:
            self.on_log(row | means)

    def _sample(self) -> None:
        if self.on_sample is not None:
            self.on_sample(self)

    @contextlib.contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the loop after the step at hand, where signals can be had."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self._stop = True
            signal.signal(number, before[signal.Signals(number)])  # a second one acts at once

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def memory_in_use(device: torch.device) -> float:
    """Peak memory in GiB: the device's for a GPU, the process' for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
