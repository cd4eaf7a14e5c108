"""`Trainer`: one stage of training, as a loop to read in a sitting.

A step is one critic update (and, every ``critic_updates_per_student_update`` steps, one student
update on the same samples). It has two parts: `Trainer._begin` writes on the device what differs
from step to step, `Trainer._advance` launches the same kernels for every step of a kind. Between
two log points nothing waits for the device: metrics stay in a `MetricBuffer`, non-finite updates
are skipped on the device, and every random number is a function of the seed and the step, so that a
resumed run is bitwise the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastdistill.config import OptimizerSettings, TrainingSettings
from fastdistill.data import Data
from fastdistill.diffusion import Noise
from fastdistill.engine.checkpoint import Checkpoint, CheckpointStore
from fastdistill.engine.folder import read_document
from fastdistill.engine.graphs import StaticBatch, StepGraphs, make_capture
from fastdistill.engine.metrics import MetricBuffer
from fastdistill.engine.shards import load_, read_tensors
from fastdistill.models import Denoiser
from fastdistill.models.compiling import compile_blocks
from fastdistill.objectives import Batch, Objective, Update
from fastdistill.optim import OptimizerStep
from fastdistill.optim.step import OptimizerState
from fastdistill.parallel import Parallel


class Interrupted(Exception):
    """Training stopped by Ctrl-C or SIGTERM, after a checkpoint was written."""


class TrainingDivergedError(RuntimeError):
    """No finite update between two log points."""


class Kind(NamedTuple):
    """What the host decides about a step."""

    student: bool
    """Whether the student is updated."""
    fresh: bool
    """Whether the student's samples are generated, and not those of an earlier step."""
    course: Hashable
    """How they are generated (`Objective.course`)."""


class Trainer:
    """Trains the networks of an objective; works alone, in anybody's script.

    The trained networks' parameters move into arenas and, over several processes, are sharded.

    Args:
        objective: what is trained, already on its device, alike on all ranks.
        data: real samples and their conditions, on the same device.
        settings: steps, batch, optimizers and intervals.
        seed: seed of every random number.
        parallel: the processes of the run and what each holds; one process if None.
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
        data: Data,
        settings: TrainingSettings,
        *,
        seed: int = 0,
        parallel: Parallel | None = None,
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
        self.parallel = parallel or Parallel()
        self.ranks = self.parallel.ranks
        self.device = next(objective.student.parameters()).device
        self.step = 0
        self.noise = Noise(seed, self.device)
        self.modules = {"student": objective.student, **objective.critic_modules()}
        self._graphs = self._make_graphs() if settings.cuda_graph else None
        if settings.accelerate:
            accelerate_networks(objective.networks())
        if settings.compile == "blocks":
            for denoiser in objective.networks().values():
                compile_blocks(denoiser.network)
        self.optimizers = {role: self._optimizer(role) for role in self.modules}
        self.arenas = {role: step.arena for role, step in self.optimizers.items()}
        """The arena of each trained network."""
        self._untrained = self._untrained_state()
        rebuilt = self._rebuilt()
        self._kept = {k: value for k, value in self._untrained.items() if k not in rebuilt}
        self.metrics = MetricBuffer(self.device, objective.noise_bins, self.ranks)
        self._index, self._share = self._split_batch()
        self._inputs = [StaticBatch() for _ in self._index]
        self._batches: list[Batch] = []
        self._samples: list[Tensor] = []
        self._sample_step: int | None = None
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
        with self._stopping_on_signals(), self.ranks.watching():
            while self.step < settings.steps:
                self.update()
                self._stop = self.ranks.any(self._stop)
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
        kind = self._begin()
        if self._graphs is None:
            self._advance(kind)
        else:
            self._graphs.run(kind, functools.partial(self._advance, kind))
        self.step += 1

    def _begin(self) -> Kind:
        """Write on the device what this step reads: batches, noise keys and learning rates.

        Samples are those of ``sample_step``: this one's on the student's turn, else those of the
        last multiple of ``sample_reuse`` since the student moved.
        """
        place = self.step % self.ratio
        student = place == self.ratio - 1
        sample_step = self.step if student else self.step - place % self.settings.sample_reuse
        fresh = sample_step == self.step
        if sample_step != self._sample_step:
            self._batches = [self._batch(micro, sample_step) for micro in range(len(self._index))]
            self._sample_step = sample_step
            if not fresh:
                self._regenerate(sample_step)
        self.noise.at(self.step)
        self.objective.before_step(self.step)
        for role, optimizer in self.optimizers.items():
            optimizer.set_rate(self.student_updates if role == "student" else self.step)
        return Kind(student, fresh, self.objective.course(self.noise) if fresh else None)

    def _advance(self, kind: Kind) -> None:
        """All that a step does on the device; of the host's numbers it reads ``kind`` alone."""
        objective, last = self.objective, len(self._batches) - 1
        for micro, batch in enumerate(self._batches):
            for arena in self.arenas.values():
                arena.reduce_gradients(micro == last)
            sample = self._generate(kind, micro, batch)
            critic_update = objective.critic_update
            if kind.student:
                shared = self._accumulate("student", objective.student_update, batch, sample)
                if shared is not None:
                    critic_update = functools.partial(critic_update, shared=shared)
            if objective.has_critic:
                self._accumulate("critic", critic_update, batch, sample.detach())
        moved = [*(["student"] if kind.student else []), *objective.critic_modules()]
        for role in moved:
            self.metrics.add(role, self.optimizers[role].apply())

    def _generate(self, kind: Kind, micro: int, batch: Batch) -> Tensor:
        """The student's samples, with a graph on its turn; kept where steps to come use them."""
        if not kind.fresh:
            return self._samples[micro]
        with torch.set_grad_enabled(kind.student):
            sample = self.objective.generate(batch)
        if self.settings.sample_reuse > 1 and not kind.student:
            self._keep(micro, sample)
        return sample

    def _keep(self, micro: int, sample: Tensor) -> None:
        if micro == len(self._samples):
            self._samples.append(torch.empty_like(sample))
        self._samples[micro].copy_(sample)

    @torch.no_grad()
    def _regenerate(self, sample_step: int) -> None:
        """Make the samples of an earlier step again, after a resume between it and their last use.

        The student has not moved since, so that they are bitwise the same.
        """
        self.noise.at(sample_step)
        for micro, batch in enumerate(self._batches):
            self._keep(micro, self.objective.generate(batch))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Denoiser]:
        """The student with its averaged weights, in evaluation mode, as for sampling."""
        student = self.objective.student
        was_training = student.training
        with self.arenas["student"].showing("ema_0"):
            yield student.eval()
        student.train(was_training)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The student's state dict with averaged weights, whole on every rank, on the CPU."""
        return self._whole_weights("ema_0")

    def weights(self) -> dict[str, Tensor]:
        """The student's state dict as it is now, in float32, whole on every rank, on the CPU."""
        return self._whole_weights("parameter")

    def _whole_weights(self, part: str) -> dict[str, Tensor]:
        arena = self.arenas["student"]
        weights = {
            name.removeprefix("student."): _whole(value)
            for name, value in self._untrained.items()
            if name.startswith("student.")
        }
        trained = arena.whole(part)
        for entry in arena.layout.entries:
            weights |= dict.fromkeys(entry.names, trained[entry.names[0]])
        return weights

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        if self.checkpoints is None:
            return
        tensors, _ = self._state()
        tensors["metrics"] = self.metrics.state_dict()
        document = {"stage": self.stage, "step": self.step, "seed": self.seed}
        document["objective"] = type(self.objective).__name__
        if self.before_checkpoint is not None:
            document["attached"] = self.before_checkpoint()
        self.checkpoints.save(self.stage, self.step, tensors, {"state": document})

    def resume(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Continue from a verified checkpoint of this stage, by any number of processes.

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
        objective = type(self.objective).__name__
        if state["objective"] != objective:
            raise ValueError(
                f"{checkpoint.path} is of objective {state['objective']}, but this run's is "
                f"{objective}: another method would not continue it; begin a new run, with "
                "start=STUDENT where it shall begin at this one's student"
            )
        tensors, optimizers = self._state()
        try:
            load_(checkpoint.path, tensors)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path} is of other networks: {error}") from error
        for optimizer in optimizers:
            optimizer.commit()
        self.metrics.load_state_dict(read_tensors(checkpoint.path, "metrics"))
        self.step = state["step"]
        self._sample_step = None
        if self._graphs is not None:
            self._graphs.clear()
        return state.get("attached", {})

    def _state(self) -> tuple[dict[str, dict[str, Tensor]], list[OptimizerState]]:
        """Every tensor of a checkpoint but the metrics, to save or to load into and commit."""
        networks = dict(self._kept)
        for role, arena in self.arenas.items():
            masters = arena.named(arena.ranges["parameter"])
            networks |= {f"{role}.{name}": value for name, value in masters.items()}
        student = self.arenas["student"]
        tensors = {"networks": networks, "ema": student.named(student.ranges["ema_0"])}
        states = {role: step.state() for role, step in self.optimizers.items()}
        tensors |= {f"optimizer-{role}": state.tensors for role, state in states.items()}
        return tensors, list(states.values())

    def _untrained_state(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters by name, the trained networks' under their roles."""
        prefixes = {f"{name}.": module for name, module in self.objective.named_modules()}
        roles = {module: role for role, module in self.modules.items()}
        trained = {
            f"{prefix}{name}"
            for prefix, module in prefixes.items()
            if module in roles
            for entry in self.arenas[roles[module]].layout.entries
            for name in entry.names
        }
        state = self.objective.state_dict()
        return {name: value for name, value in state.items() if name not in trained}

    def _rebuilt(self) -> set[str]:
        """Names of weights that whoever resumes has anyway, as the base of a LoRA student."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.objective.named_modules()
            for name in getattr(module, "rebuilt", ())
        }

    def _accumulate(
        self, role: str, make: Callable[..., Update], batch: Batch, sample: Tensor
    ) -> Any:
        """Add one micro-batch's gradients for a role, and its metrics; returns what it shares."""
        with contextlib.ExitStack() as frozen:
            if role == "student":
                for name in self.objective.frozen_roles():
                    frozen.enter_context(self.arenas[name].frozen())
            update = make(batch, sample)
            update.backward()  # blocks that are recomputed in it must find the same frozen weights
        self.metrics.add(role, update.metrics)
        if update.noise_bin is not None:
            chosen = {name: update.metrics[name] for name in update.by_level}
            self.metrics.add_by_level(role, chosen, update.noise_bin)
        return update.shared

    def _batch(self, micro: int, step: int | None = None) -> Batch:
        """One micro-batch of a step, by default of the one at hand."""
        settings, index = self.settings, self._index[micro]
        step = self.step if step is None else step
        number = step * settings.accumulation + micro
        given = self.data.batch(self.seed, number, settings.batch_size, self._share)
        if self._graphs is not None:
            given = self._inputs[micro].take(given)
        real, condition, uncondition = given
        scale = 1 / (len(index) * settings.accumulation)
        shape, gather, share = self.data.shape, self.ranks.gather, self._share
        return Batch(index, self.noise, scale, shape, real, condition, uncondition, gather, share)

    def _split_batch(self) -> tuple[list[Tensor], slice]:
        """This rank's sample indices in each micro-batch, and where they are in it."""
        size, ranks = self.settings.batch_size, self.ranks
        if size % ranks.size:
            raise ValueError(
                f"batch_size is {size}, which {ranks.size} ranks cannot share equally; choose a "
                "multiple"
            )
        own = size // ranks.size
        share = slice(ranks.rank * own, (ranks.rank + 1) * own)
        rows = torch.arange(self.settings.accumulation * size, device=self.device)
        return [micro[share] for micro in rows.split(size)], share

    def _optimizer(self, role: str) -> OptimizerStep:
        """A trained network's arena, and the optimizer that works in it."""
        settings, module = self.settings, self.modules[role]
        options: OptimizerSettings | None = getattr(settings, role)
        if options is None:
            raise ValueError(f"settings.{role} is None, but the objective trains a {role}")
        is_student = role == "student"
        low = torch.bfloat16 if settings.precision == "bfloat16" else None
        if isinstance(module, Denoiser):
            module.input_dtype = low
        else:
            low = None  # a discriminator is small, and computes in float32
        stochastic = settings.stochastic_rounding and low is not None
        if stochastic and self.parallel.mode != "single":
            raise ValueError(
                f"stochastic_rounding is for one process; in mode {self.parallel.mode} weights are "
                "rounded to nearest when they are gathered from float32 shards: turn it off"
            )
        arena = self.parallel.arena(
            module,
            role,
            compute_dtype=low,
            averages=int(is_student),
            moments=settings.moments,
            static=settings.cuda_graph,
        )
        return OptimizerStep(
            arena,
            updates=settings.steps // self.ratio if is_student else settings.steps,
            half_lives=[settings.ema_half_life] if is_student else [],
            stochastic_rounding=stochastic,
            seed=self.seed,
            rate_on_device=settings.cuda_graph,
            drop_gradients=settings.drop_gradients,
            **dict(options),
        )

    def _make_graphs(self) -> StepGraphs:
        if self.parallel.mode == "fsdp":
            raise ValueError(
                "cuda_graph is for modes single and resident: in mode fsdp weights are gathered "
                "to new addresses; turn it off, or choose parallel.mode resident"
            )
        return StepGraphs(make_capture(self.device, self._side_streams))

    def _side_streams(self) -> list[torch.cuda.Stream]:
        return [stream for arena in self.arenas.values() for stream in arena.side_streams()]

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


def accelerate_networks(denoisers: Mapping[str, Denoiser]) -> None:
    """Replace layers of every denoiser's network by faster ones, in place.

    Raises:
        ValueError: for a network that has no layer which `fastdistill.accelerate` knows.
    """
    from fastdistill.layers import accelerate, is_accelerated

    for role, denoiser in denoisers.items():
        network = getattr(denoiser.network, "base", denoiser.network)
        if not is_accelerated(network) and not accelerate(network).replaced:
            raise ValueError(
                f"training.accelerate: the {role}'s {type(network).__name__} has no layer that "
                "fastdistill.accelerate knows; turn it off"
            )


def _whole(value: Tensor) -> Tensor:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.to("cpu", copy=True)


def memory_in_use(device: torch.device) -> float:
    """Peak memory in GiB: the device's for a GPU, the process' for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
