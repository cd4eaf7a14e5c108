"""`measure`: one op beside its rivals, so that a kernel engineer believes the numbers.

A `Case` is one op at one shape and dtype. Each of its variants is proven before it is timed: a
result that differs from the float64 reference is refused and gets no time. What is timed:

- Every variant walks through the same sets of inputs, together three times the last-level cache or
  more where memory allows, so that nothing finds its inputs in the cache by having just read them.
- Warm-up is by time. Variants take turns, in a new random order each round; a sample is at least
  `Timer.shortest` seconds of calls. Reported are medians, with half the distance of the quartiles
  as their spread.
- The ceiling is what memory gives: in the same rounds, a copy between rotating buffers (a scaling
  in place for in-place ops) that moves as many bytes as the op must by its stated model.
- CPU time a call, measured apart, is on a GPU the time to enqueue it and on a CPU that of all
  threads together.
- Peak memory is the most that torch's allocator had handed out at once during one call beyond what
  was held before: results and temporaries, not inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.timers import Bystanders, Timer

OURS = "fastdistill"
GRAPH = ", CUDA graph"
CEILINGS = {"copy": "copy of as many bytes", "scale": "in-place scaling of as many bytes"}
MOST_SETS = 64
LATENT_BYTES = 64 * 2**20
BUSY = 0.05
"""Share of the CPU in other hands above which times mean little."""

Results = tuple[Tensor, ...]
Run = Callable[[], Results]
Judge = Callable[[Results], str | None]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute a case."""

    bind: Callable[[Any], Run]
    """Given one set of inputs, the call to be timed; what it prepares is not timed."""
    judge: Callable[[Any], Judge] | None = None
    """Stands in for the case's judge, where this variant rightly computes something else."""
    waits: bool = False
    """Whether it waits for the host, so that no CUDA graph can be made of it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape and dtype, and everything that it is compared with."""

    op: str
    shape: str
    dtype: torch.dtype
    bytes_moved: int
    """Bytes that must be moved by the op's stated model."""
    make: Callable[[torch.Generator], Any]
    """One set of inputs, a (named) tuple with all tensors that the op reads or changes."""
    variants: dict[str, Variant]
    """By name; `OURS` is the one that the others are compared with."""
    judge: Callable[[Any], Judge]
    """Given a set of inputs, before a variant runs on it, says what is wrong with the results."""
    flops: int = 0
    """Additions and multiplications, of an op that is bound by arithmetic."""
    ceiling: str = "copy"
    """What bounds the op: a key of `CEILINGS`."""
    in_place: bool = False
    """Whether variants change their inputs, so that each must be proven on a fresh set."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of one variant; times are None where the note says why there is none."""

    op: str
    shape: str
    dtype: str
    variant: str
    bytes_moved: int
    microseconds: float | None = None
    least: float | None = None
    """Shortest sample, in microseconds a call."""
    spread: float | None = None
    """Half the distance of the quartiles, as a share of the median."""
    ratio: float | None = None
    """Its time over ours."""
    gigabytes_per_second: float | None = None
    ceiling: float | None = None
    """The ceiling's time over its own: the share of the bandwidth measured in the same rounds."""
    gigaflops_per_second: float | None = None
    """Of an op that is bound by arithmetic."""
    cpu_microseconds: float | None = None
    peak_bytes: int | None = None
    cold: bool = True
    """Whether the sets of inputs together exceeded the last-level cache."""
    others: float = 0.0
    """Share of all CPU cores that other programs took meanwhile."""
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells a row from the others of a run."""
        return self.op, self.shape, self.dtype, self.variant


class Walk:
    """A variant bound to every set of inputs; each call moves on to the next set."""

    def __init__(self, runs: Sequence[Callable[[], Any]], calls: int = 1) -> None:
        self.calls_per_run = calls
        self._next = itertools.cycle(runs)
        self._repeats = 1

    def __call__(self) -> None:
        for _ in range(self._repeats):
            next(self._next)()

    @property
    def calls(self) -> int:
        """How many times the op is computed in one sample."""
        return self._repeats * self.calls_per_run

    def warm_up(self, timer: Timer, seconds: float) -> None:
        """Run for ``seconds``, then choose repeats so that samples are long enough to time."""
        end = time.perf_counter() + seconds
        fastest = timer.elapsed(self)
        while time.perf_counter() < end:
            fastest = min(fastest, timer.elapsed(self))
        self._repeats = min(MOST_SETS, math.ceil(timer.shortest / max(fastest, 1e-9)))


def measure(case: Case, timer: Timer, seconds: float, least_rounds: int = 5) -> list[Row]:
    """Prove and time all variants of a case; ``seconds`` is the time that each is given."""
    faults = prove(case, case.variants, timer.device)
    inputs = case.make(generator(timer.device))
    sets = [inputs, *_more_sets(case, inputs, timer)]
    peaks: dict[str, int] = {}
    walks = {CEILINGS[case.ceiling]: Walk(_ceiling(case, timer))}
    for name in [name for name in case.variants if name not in faults]:
        runs = [case.variants[name].bind(inputs) for inputs in sets]
        peaks[name] = timer.peak_bytes(runs[0])
        walks[name] = Walk(runs)
        if timer.captures and case.bytes_moved < LATENT_BYTES and not case.variants[name].waits:
            try:
                walks[name + GRAPH] = Walk([timer.capture(runs)], len(runs))
            except Exception as error:
                faults[name + GRAPH] = f"cannot be captured: {_first_line(error)}"
    bystanders = Bystanders()
    samples = _in_turns(walks, timer, seconds, least_rounds)
    others = bystanders.share()
    cold = sum(map(footprint, sets)) > timer.cache_bytes
    rows = [
        dataclasses.replace(
            row,
            cpu_microseconds=_cpu_microseconds(row, walks[row.variant], timer),
            peak_bytes=peaks.get(row.variant),
            cold=cold,
            others=others,
        )
        for row in _rows(case, samples)
    ]
    return rows + [_row(case, name, note=fault) for name, fault in faults.items()]


def prove(case: Case, names: Iterable[str], device: torch.device) -> dict[str, str]:
    """What is wrong with these variants' results on the inputs of seed 0, where something is."""
    shared: Any = None if case.in_place else case.make(generator(device))
    usual = None if case.in_place else case.judge(shared)
    faults = {name: _fault(case, name, device, shared, usual) for name in names}
    return {name: fault for name, fault in faults.items() if fault is not None}


def _fault(
    case: Case, name: str, device: torch.device, shared: Any, usual: Judge | None
) -> str | None:
    """A function of its own, so that no two sets of what is changed in place are held at once."""
    variant = case.variants[name]
    inputs = case.make(generator(device)) if case.in_place else shared
    try:
        judge = variant.judge(inputs) if variant.judge else usual or case.judge(inputs)
        fault = judge(variant.bind(inputs)())
    except Exception as error:
        return f"failed: {type(error).__name__}: {_first_line(error)}"
    return None if fault is None else f"wrong result, refused: {fault}"


def near(exact: Results, tolerance: float) -> Judge:
    """A judge that compares results one by one with the exact ones."""

    def judge(found: Results) -> str | None:
        if len(found) != len(exact):
            return f"{len(found)} results; expected {len(exact)}"
        for index, (value, truth) in enumerate(zip(found, exact, strict=True)):
            if value.shape != truth.shape:
                return f"result {index} has shape {tuple(value.shape)}, not {tuple(truth.shape)}"
            norm = truth.norm().clamp(min=torch.finfo(truth.dtype).tiny)
            error = float((value.detach().double() - truth).norm() / norm)
            if not error <= tolerance:
                return f"result {index} is off by {error:.1e}; at most {tolerance:.0e} is right"
        return None

    return judge


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """A source of random inputs."""
    return torch.Generator(device).manual_seed(seed)


def footprint(inputs: Any) -> int:
    """Bytes of the different tensors in a set of inputs."""
    different = {tensor.data_ptr(): tensor for tensor in tensors(inputs)}
    return sum(tensor.numel() * tensor.element_size() for tensor in different.values())


def tensors(inputs: Any) -> list[Tensor]:
    """All tensors of a set of inputs."""
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def identity(case: Case) -> tuple[str, str, str]:
    """Op, shape and dtype as rows name them."""
    return case.op, case.shape, str(case.dtype).removeprefix("torch.")


def _more_sets(case: Case, first: Any, timer: Timer) -> Iterator[Any]:
    size = max(footprint(first), 1)
    count = min(math.ceil(timer.rotation_bytes / size), timer.memory_bytes // size, MOST_SETS)
    for seed in range(1, count):
        yield case.make(generator(timer.device, seed))


def _ceiling(case: Case, timer: Timer) -> list[Callable[[], Any]]:
    """Calls that move as many bytes as the op, half of them read and half written."""
    count = max(case.bytes_moved // 8, 1)
    size = case.bytes_moved if case.ceiling == "copy" else case.bytes_moved // 2
    sets = range(min(math.ceil(timer.rotation_bytes / max(size, 1)), MOST_SETS))

    def buffer() -> Tensor:
        return torch.ones(count, device=timer.device)

    if case.ceiling == "scale":
        return [_scale(buffer()) for _ in sets]
    return [_copy(buffer(), buffer()) for _ in sets]


def _scale(values: Tensor) -> Callable[[], Any]:
    return lambda: values.mul_(-1.0)


def _copy(target: Tensor, source: Tensor) -> Callable[[], Any]:
    return lambda: target.copy_(source)


def _in_turns(
    walks: dict[str, Walk], timer: Timer, seconds: float, least_rounds: int
) -> dict[str, list[float]]:
    """Seconds a call of every walk, over and over."""
    for walk in walks.values():
        walk.warm_up(timer, seconds / 2)
    samples: dict[str, list[float]] = {name: [] for name in walks}
    order = list(walks)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds * len(walks)
    while len(samples[order[0]]) < least_rounds or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            samples[name].append(timer.elapsed(walks[name]) / walks[name].calls)
    return samples


def _rows(case: Case, samples: dict[str, list[float]]) -> Iterator[Row]:
    medians = {name: statistics.median(found) for name, found in samples.items()}
    ours = medians.get(OURS)
    for name, median in medians.items():
        yield _row(
            case,
            name,
            microseconds=median * 1e6,
            least=min(samples[name]) * 1e6,
            spread=_quartile_distance(sorted(samples[name])) / 2 / median,
            ratio=None if ours is None else median / ours,
            gigabytes_per_second=case.bytes_moved / median / 1e9,
            gigaflops_per_second=case.flops / median / 1e9 if case.flops else None,
            ceiling=medians[CEILINGS[case.ceiling]] / median,
        )


def _row(case: Case, variant: str, **found: Any) -> Row:
    return Row(*identity(case), variant, case.bytes_moved, **found)


def _cpu_microseconds(row: Row, walk: Walk, timer: Timer) -> float:
    assert row.microseconds is not None
    return timer.cpu(walk, row.microseconds / 1e6 * walk.calls) / walk.calls * 1e6


def _quartile_distance(ordered: list[float]) -> float:
    return ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
