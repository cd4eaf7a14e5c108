"""The same cases under pytest-benchmark, for its histograms, storage and comparisons.

    python -m pytest bench -o addopts= --benchmark-only --benchmark-group-by=group

Variants run one after the other here; `python -m bench` lets them take turns, and is the place for
ratios.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from bench.harness import generator, prove
from bench.suite import OPS

CPU = torch.device("cpu")
CASES = [next(OPS[op](CPU, False)) for op in OPS]


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case.op}-{name}") for case in CASES for name in case.variants],
)
def test_speed(benchmark: Any, case: Any, name: str) -> None:
    benchmark.group = f"{case.op} {case.shape} {case.dtype}"
    sets = [case.make(generator(CPU, seed)) for seed in range(3)]
    faults = prove(case, [name], CPU)
    if faults:
        pytest.fail(faults[name])
    runs = itertools.cycle([case.variants[name].bind(inputs) for inputs in sets])
    benchmark(lambda: next(runs)())
    torch.compiler.reset()
