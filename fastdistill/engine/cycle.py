"""What a training cycle does: a student update and its critic updates, run on the meta device.

The objective's own `generate`, `student_update` and `critic_update` run, with the real networks at
full size, under a `Counter`: nothing of the method is modelled here but how often the trainer calls
them. Optimizers and collectives are not part of it (`fastdistill.engine.planning`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.config import TrainingSettings
from fastdistill.data import RealBatch
from fastdistill.diffusion import Noise
from fastdistill.engine.counting import Counter, Peak, Size, Work
from fastdistill.models import Denoiser
from fastdistill.objectives import Batch, Objective

PRIMES = (61, 59, 53, 47, 43, 41, 37, 31)
"""Batch sizes to count at; below 64, where diffusers upsamples another way."""
_PASSES = ("forward", "features", "forward_with_features")


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of an update, of one micro-batch."""

    update: str
    """Whose update: student or critic."""
    name: str
    """As "teacher forward", "backward" or "losses"."""
    times: float
    """How often it happens in a cycle."""
    work: Work
    """Once."""
    has_graph: bool = False
    """Whether it is a forward that keeps a graph."""


@dataclasses.dataclass(frozen=True)
class Cycle:
    """One student update with its critic updates, of one micro-batch on one rank."""

    parts: list[Part]
    updates: dict[str, int]
    """Updates of each trained network."""
    passes: dict[str, float]
    """Forwards and backwards of each network: what gathers its weights in mode fsdp."""
    activations: dict[str, Size]
    """Bytes that a forward with a graph leaves alive for its backward, by role."""
    peak: Peak
    """The most bytes alive at once, of everything but parameters and what the arena holds."""
    checkpointed: bool
    """Whether blocks are recomputed in the backward pass."""

    @property
    def work(self) -> Work:
        """Everything that the networks and losses do in a cycle."""
        total = Work()
        for part in self.parts:
            total = total.plus(part.work.times(part.times))
        return total


def count_cycle(
    objective: Objective,
    training: TrainingSettings,
    shape: tuple[int, ...],
    inputs: Callable[[int], RealBatch],
    *,
    checkpointed: bool = False,
    keeps_gradients: bool = False,
) -> Cycle:
    """Count one cycle of an objective whose networks are on the meta device; they are changed.

    Args:
        objective: as the trainer gets it, with float32 student and critic.
        training: precision, critic updates and reuse of samples.
        shape: shape of one sample.
        inputs: makes a batch of data on the meta device.
        checkpointed: whether blocks are recomputed; the networks must be set so already.
        keeps_gradients: whether gradients stay until the update, as with ``drop_gradients`` in mode
            single, instead of being added to the arena's at once.
    """
    low = torch.bfloat16 if training.precision == "bfloat16" else None
    modules = {"student": objective.student, **objective.critic_modules()}
    for module in modules.values():
        if low is not None and isinstance(module, Denoiser):
            module.input_dtype = low
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(low)
    batch_size = _prime(objective)
    counter = Counter(batch_size)
    watch = _Watch(counter, objective)
    noise = _FirstChoice(0, "meta")
    added = contextlib.nullcontext() if keeps_gradients else _as_in_arenas(modules)
    with counter, watch, added:
        make = functools.partial(_batch, noise, batch_size, shape, inputs)
        _student_turn(objective, watch, make)  # its gradients are there during the critic's turn
        _critic_turn(objective, watch, make)
    n = training.critic_updates_per_student_update if objective.has_critic else 1
    steps = len(getattr(objective, "student_times", (0,)))
    parts = watch.parts(n, -(-(n - 1) // training.sample_reuse), (steps - 1) / 2)
    updates = {role: 1 if role == "student" else n for role in modules}
    return Cycle(parts, updates, _gathers(parts), watch.kept, counter.peak, checkpointed)


class _FirstChoice(Noise):
    """Backward simulation that trains the student at its first time; more steps only add up."""

    def choice(self, stream: str, count: int) -> int:
        return 0


def _prime(objective: Objective) -> int:
    """A batch size that divides no dimension of the networks."""
    networks = {**objective.networks(), **objective.critic_modules()}.values()
    sizes = {
        length
        for module in networks
        for value in (*module.parameters(), *module.buffers())
        for length in value.shape
    }
    return next((prime for prime in PRIMES if all(size % prime for size in sizes)), PRIMES[0])


def _batch(
    noise: Noise, count: int, shape: tuple[int, ...], inputs: Callable[[int], RealBatch]
) -> Batch:
    real, condition, uncondition = inputs(count)
    index = torch.arange(count, device="meta")
    return Batch(index, noise, 1 / count, shape, real, condition, uncondition)


def _critic_turn(objective: Objective, watch: _Watch, make: Callable[[], Batch]) -> None:
    """Samples without a graph and, where the student's turn differs from it, a critic update."""
    with watch.update("critic", "samples"), torch.no_grad():
        batch = make()
        sample = objective.generate(batch)
    if objective.has_critic:
        with watch.update("critic", "update"):
            update = objective.critic_update(batch, sample)
            with watch.part("backward"):
                update.backward()


def _student_turn(objective: Objective, watch: _Watch, make: Callable[[], Batch]) -> None:
    with watch.update("student", "update"):
        batch = make()
        sample = objective.generate(batch)
        with contextlib.ExitStack() as frozen:
            for role in objective.frozen_roles():
                frozen.enter_context(_frozen(objective.critic_modules()[role]))
            update = objective.student_update(batch, sample)
            with watch.part("backward"):
                update.backward()
    if update.shared is not None:
        with watch.update("critic", "shared update"):
            second = objective.critic_update(batch, sample.detach(), shared=update.shared)
            with watch.part("backward"):
                second.backward()


class _Watch:
    """Names the parts of a counter by update and network."""

    def __init__(self, counter: Counter, objective: Objective) -> None:
        self.counter, self.objective = counter, objective
        self.kept: dict[str, Size] = {}
        self._update = self._turn = ""
        self._inside = False
        self._graphs: set[str] = set()
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        roles = {**self.objective.networks(), **self.objective.critic_modules()}
        for role, module in roles.items():
            network: Any = module.network if isinstance(module, Denoiser) else module
            for name in _PASSES:
                if hasattr(network, name):
                    self._wrap(network, name, role)

    def __exit__(self, *exception: Any) -> None:
        for undo in reversed(self._undo):
            undo()

    @contextlib.contextmanager
    def update(self, update: str, turn: str) -> Iterator[None]:
        """Name what runs in this context by whose update it belongs to."""
        self._update, self._turn = update, turn
        with self.part("losses"):
            yield

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name what runs in this context, but for the networks' passes."""
        with self.counter.part(f"{self._update}/{self._turn}/{name}"):
            yield

    def parts(self, n: int, generations: int, simulated: float) -> list[Part]:
        """The parts of a cycle of ``n`` critic updates.

        Args:
            n: critic updates.
            generations: batches of samples that are generated for critic updates alone.
            simulated: the student's steps before the one that is trained, on average.
        """
        shared = any(key.startswith("critic/shared update/") for key in self.counter.parts)
        times = {
            "critic/samples": generations + simulated * (generations + 1),
            "critic/update": n - 1 if shared else n,
            "critic/shared update": 1,
            "student/update": 1,
        }
        found = []
        for key, work in self.counter.parts.items():
            update, turn, name = key.split("/")
            often = times[f"{update}/{turn}"]
            if often:
                found.append(Part(update, name, often, work, key in self._graphs))
        return found

    def _wrap(self, network: Any, method: str, role: str) -> None:
        original = getattr(network, method)
        name = f"{role} {'features' if method == 'features' else 'forward'}"

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # as a LoRA critic's pass runs the teacher's layers
                return original(*args, **kwargs)
            before, self._inside = self.counter.live, True
            try:
                with self.part(name):
                    out = original(*args, **kwargs)
            finally:
                self._inside = False
            outputs = out if isinstance(out, tuple | list) else [out]
            flat = [one for part in outputs for one in (part if isinstance(part, list) else [part])]
            if any(value.requires_grad for value in flat if isinstance(value, Tensor)):
                self._graphs.add(f"{self._update}/{self._turn}/{name}")
                made = self.counter.live.plus(before.times(-1))
                self.kept[role] = max(made, self.kept.get(role, Size()), key=lambda x: x.at(1e3))
            return out

        setattr(network, method, watched)
        self._undo.append(lambda: delattr(network, method))


def _gathers(parts: list[Part]) -> dict[str, float]:
    """Forwards of each network, and backwards, of which each graph has one."""
    found: dict[str, float] = {}
    for part in parts:
        role, _, name = part.name.partition(" ")
        if name in ("forward", "features"):
            found[role] = found.get(role, 0) + part.times * (2 if part.has_graph else 1)
    return found


@contextlib.contextmanager
def _as_in_arenas(modules: dict[str, nn.Module]) -> Iterator[None]:
    """Free each gradient as soon as it is made, as where it is added to an arena's range."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(drop)
        for module in modules.values()
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    trained = [value for value in module.parameters() if value.requires_grad]
    for value in trained:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in trained:
            value.requires_grad_(True)
