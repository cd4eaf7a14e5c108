"""Timing that survives a shared machine: variants interleaved, medians, ratios within one run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape and dtype, and everything it is compared with."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes_moved: int
    """Bytes that must be moved: each tensor read once and each result written once."""
    variants: dict[str, Run]
    """By name, ours first; each returns the tensor that `exact` is the truth of."""
    exact: Tensor | None
    """The reference in float64, or None where variants draw different noise."""
    tolerance: float = 2e-2


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of one variant."""

    op: str
    shape: str
    dtype: str
    threads: int
    variant: str
    microseconds: float
    spread: float
    """Half the distance of the quartiles, as a share of the median."""
    ratio: float
    """Its time over ours."""
    bandwidth: float
    """Bytes that must be moved over its time, as a share of a copy of the same size."""


def measure(case: Case, threads: int, seconds: float = 0.6) -> list[Row]:
    """Time all variants of a case, after checking each against the float64 reference.

    Raises:
        AssertionError: for a variant whose result is wrong: it gets no time.
    """
    for name, run in case.variants.items():
        found = run()
        if case.exact is not None:
            error = (found.double() - case.exact).norm() / case.exact.norm()
            assert error < case.tolerance, f"{case.op} {name}: relative error {float(error):.2e}"
    source = torch.empty(max(case.bytes_moved // 2, 1), dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    runs = {"copy": lambda: target.copy_(source)} | case.variants
    times = {name: sorted(samples) for name, samples in _interleaved(runs, seconds).items()}
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    ours = medians[next(iter(case.variants))]
    return [
        Row(
            case.op,
            "x".join(map(str, case.shape)),
            str(case.dtype).removeprefix("torch."),
            threads,
            name,
            medians[name] * 1e6,
            _quartile_distance(times[name]) / 2 / medians[name],
            medians[name] / ours,
            medians["copy"] / medians[name],
        )
        for name in case.variants
    ]


def _interleaved(runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    """Seconds a call of every run, in turns, after a warm-up by time."""
    for run in runs.values():
        _repeat_for(run, seconds / 6)
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(times["copy"]) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def _repeat_for(run: Run, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        run()


def _quartile_distance(samples: list[float]) -> float:
    return samples[3 * len(samples) // 4] - samples[len(samples) // 4]
