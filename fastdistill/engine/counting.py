"""Counting what a computation does and holds, by running it on the meta device.

A `Counter` watches every kernel that would run: floating-point operations, bytes that kernels must
move, the number of kernels, what autograd saves, and the bytes of all tensors that are alive.
Nothing is computed, so that SDXL takes a second and no memory. On real tensors it counts the same.

**Sizes for every batch from one run.** A graph is counted at a batch size that divides no size but
those of samples, as 61. A tensor whose size it divides grows with the batch, another one does not,
so that each number is a `Size`: a fixed part and one for each sample.

**As on a GPU.** On the meta device torch decomposes attention and RMS norm into many small ops.
Devices run one kernel for each, so here they are one op too, which saves what the kernel saves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastdistill.engine.op_costs import Op, like_on_devices


class Size(NamedTuple):
    """A count that is ``fixed + batch * per_sample``."""

    fixed: float = 0
    per_sample: float = 0

    def at(self, batch: float) -> float:
        """The count for a batch."""
        return self.fixed + batch * self.per_sample

    def plus(self, other: Size) -> Size:
        """The sum."""
        return Size(self.fixed + other.fixed, self.per_sample + other.per_sample)

    def times(self, factor: float) -> Size:
        """The multiple."""
        return Size(factor * self.fixed, factor * self.per_sample)


@dataclasses.dataclass
class Work:
    """What kernels do."""

    flops: dict[str, Size] = dataclasses.field(default_factory=dict)
    """By class: linear, convolution, attention."""
    bytes: dict[str, Size] = dataclasses.field(default_factory=dict)
    """Moved by kernels that are bound by memory, by family, as add, GELU, LayerNorm: every tensor
    read or written counts once."""
    matmul_bytes: Size = dataclasses.field(default_factory=Size)
    """Moved by the kernels that ``flops`` counts."""
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    """Launches: matmul (the kernels of ``flops``) and memory."""

    def plus(self, other: Work) -> Work:
        """Both together."""
        return Work(
            _merged(self.flops, other.flops),
            _merged(self.bytes, other.bytes),
            self.matmul_bytes.plus(other.matmul_bytes),
            {
                kind: self.kernels.get(kind, 0) + other.kernels.get(kind, 0)
                for kind in {**self.kernels, **other.kernels}
            },
        )

    def times(self, factor: float) -> Work:
        """The same, ``factor`` times."""
        return Work(
            {kind: size.times(factor) for kind, size in self.flops.items()},
            {family: size.times(factor) for family, size in self.bytes.items()},
            self.matmul_bytes.times(factor),
            {kind: factor * count for kind, count in self.kernels.items()},
        )

    @property
    def total_flops(self) -> Size:
        """Of all classes."""
        return _total(self.flops.values())

    @property
    def total_bytes(self) -> Size:
        """Of all families that are bound by memory."""
        return _total(self.bytes.values())


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most bytes alive at once: for each batch size the largest of a few `Size`s."""

    candidates: tuple[Size, ...] = ()

    def at(self, batch: float) -> float:
        """Bytes for a batch."""
        return max((size.at(batch) for size in self.candidates), default=0)

    def over(self, other: Peak) -> Peak:
        """The larger of both, for every batch size."""
        return Peak(_largest([*self.candidates, *other.candidates]))

    def above(self, held: Size) -> Peak:
        """The peak with these bytes alive besides."""
        return Peak(tuple(size.plus(held) for size in self.candidates))


class Counter:
    """Counts everything that runs in its context, in named parts.

    Args:
        batch: batch size of what runs, to tell what grows with it; 1 makes every `Size` a total
            per sample.
    """

    def __init__(self, batch: int = 1) -> None:
        self.batch = batch
        self.parts: dict[str, Work] = {}
        """Work by part, in the order in which they began."""
        self.peaks: dict[str, Peak] = {}
        """The most bytes alive at once during each part, of tensors made in the context."""
        self.saved: dict[str, Size] = {}
        """Storages that autograd saved during each part and that were made in the context."""
        self._live: dict[int, _Storage] = {}
        self._now = Size()
        self._part = ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Counter:
        self._stack.enter_context(like_on_devices())
        self._stack.enter_context(_Watch(self))
        self._stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved)
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs in this context under a name; the innermost name counts."""
        outer, self._part = self._part, name
        self._note_peak()
        try:
            yield
        finally:
            self._part = outer

    @property
    def work(self) -> Work:
        """Of all parts."""
        total = Work()
        for work in self.parts.values():
            total = total.plus(work)
        return total

    @property
    def live(self) -> Size:
        """Bytes of the tensors that were made in the context and are alive now."""
        return self._now

    @property
    def peak(self) -> Peak:
        """Over all parts."""
        total = Peak()
        for peak in self.peaks.values():
            total = total.over(peak)
        return total

    def size(self, count: float) -> Size:
        """A count as a `Size`: per sample where the batch size divides it."""
        return Size(0, count // self.batch) if count % self.batch == 0 else Size(count, 0)

    def _kernel(self, op: Op, flops: float, touched: list[int]) -> None:
        work = self.parts.setdefault(self._part, Work())
        moved = _total(map(self.size, touched))
        kind = "memory" if op.kind is None else "matmul"
        work.kernels[kind] = work.kernels.get(kind, 0) + 1
        if op.kind is None:
            work.bytes[op.family] = work.bytes.get(op.family, Size()).plus(moved)
        else:
            work.flops[op.kind] = work.flops.get(op.kind, Size()).plus(self.size(flops))
            work.matmul_bytes = work.matmul_bytes.plus(moved)

    def _track(self, tensor: Tensor) -> None:
        """Count a new tensor's storage until nobody holds it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = self.size(storage.nbytes())
        self._live[key] = _Storage(weakref.ref(storage, lambda _: self._forget(key)), size)
        self._now = self._now.plus(size)
        self._note_peak()

    def _forget(self, key: int) -> None:
        self._now = self._now.plus(self._live.pop(key).size.times(-1))

    def _note_peak(self) -> None:
        known = self.peaks.get(self._part, Peak()).candidates
        if not any(
            one.fixed >= self._now.fixed and one.per_sample >= self._now.per_sample for one in known
        ):
            self.peaks[self._part] = Peak(_largest([*known, self._now]))

    def _save(self, tensor: Tensor) -> Tensor:
        storage = self._live.get(tensor.untyped_storage()._cdata)
        if storage is not None and not storage.is_saved:
            storage.is_saved = True
            self.saved[self._part] = self.saved.get(self._part, Size()).plus(storage.size)
        return tensor


def count_forward(run: Callable[[], Any], batch: int = 1) -> Work:
    """The work of a computation without a graph.

    Args:
        run: runs it, as ``lambda: network(x, t, condition)``, on meta or real tensors.
        batch: batch size of what it runs on, to tell what grows with it.
    """
    with Counter(batch) as counter, torch.no_grad():
        run()
    return counter.work


class Training(NamedTuple):
    """A forward with a graph, and its backward."""

    forward: Work
    backward: Work
    saved: Size
    """What autograd saves: storages made by the forward."""
    kept: Size
    """All that the forward leaves alive, as saved activations, the inputs of checkpointed blocks
    and the outputs."""
    peak: Peak
    """The most bytes alive at once, of tensors made by forward and backward."""


def count_training(run: Callable[[], Tensor], batch: int = 1) -> Training:
    """Work and memory of a forward and a backward pass.

    Args:
        run: runs the forward and returns its output. Gradients reach what requires them: freeze the
            parameters to count a backward to the input alone, and let parameters have a ``grad`` to
            count its accumulation instead of its allocation.
        batch: batch size of what it runs on, to tell what grows with it.
    """
    with Counter(batch) as counter, torch.enable_grad():
        with counter.part("forward"):
            output = run()
        kept = counter.live
        with counter.part("backward"):
            output.backward(torch.empty_like(output))
    forward, backward = (counter.parts.get(name, Work()) for name in ("forward", "backward"))
    saved = counter.saved.get("forward", Size())
    return Training(forward, backward, saved, kept, counter.peak)


def saved_activation_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd saves in a forward for the backward pass.

    Each storage counts once, whole. Tensors that lived before, as parameters and inputs, do not.

    Args:
        run: runs the forward, as ``lambda: block(x)``, on meta or real tensors.
    """
    with Counter() as counter, torch.enable_grad():
        output = run()
    del output
    return round(sum(size.at(1) for size in counter.saved.values()))


class _Storage:
    """A storage that is alive."""

    def __init__(self, reference: weakref.ref, size: Size) -> None:
        self.reference, self.size, self.is_saved = reference, size, False


class _Watch(TorchDispatchMode):
    """Reports every op to a counter."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter
        self._ops: dict[Any, Op] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        op = self._ops.get(function)
        if op is None:
            op = self._ops[function] = Op(function)
        outputs = [value for value in tree_iter(out) if isinstance(value, Tensor)]
        if op.launches:
            flops = 0 if op.formula is None else op.formula(*args, **kwargs, out_val=out)
            self.counter._kernel(op, flops, op.touched(args, kwargs, outputs))
        if not op.is_view:
            for tensor in outputs:
                self.counter._track(tensor)
        return out


def _largest(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Those that are the largest for some batch size: the upper hull of their lines."""
    hull: list[Size] = []
    for size in sorted(set(sizes), key=lambda size: (size.per_sample, size.fixed)):
        while hull and hull[-1].fixed <= size.fixed:
            hull.pop()
        while len(hull) > 1 and _crossing(hull[-1], size) <= _crossing(hull[-2], hull[-1]):
            hull.pop()
        hull.append(size)
    return tuple(hull)


def _crossing(flat: Size, steep: Size) -> float:
    """The batch size from which on the steeper of two lines is the larger."""
    return (flat.fixed - steep.fixed) / (steep.per_sample - flat.per_sample)


def _merged(one: dict[str, Size], other: dict[str, Size]) -> dict[str, Size]:
    return {key: one.get(key, Size()).plus(other.get(key, Size())) for key in {**one, **other}}


def _total(sizes: Iterable[Size]) -> Size:
    total = Size()
    for size in sizes:
        total = total.plus(size)
    return total
