"""The ops that there are cases for, and the run over them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bench import (
    bench_adamw,
    bench_consistency,
    bench_denoising,
    bench_density_ratio,
    bench_gaussian,
    bench_glu,
    bench_group_norm,
    bench_matching,
    bench_mixture,
    bench_noise,
    bench_norm,
    bench_optimizer,
    bench_projection,
    bench_renoise,
    bench_tokens,
)
from bench.harness import OURS, Case, Row, identity, measure
from bench.timers import timer_for

OPS: dict[str, Callable[[torch.device, bool], Iterator[Case]]] = {
    "renoise": bench_renoise.cases,
    "matching_cotangent": bench_matching.cases,
    "projection_cotangents": bench_projection.cases,
    "consistency_cotangent": bench_consistency.cases,
    "denoising_cotangent": bench_denoising.cases,
    "adamw_ema_": bench_adamw.cases,
    "optimizer": bench_optimizer.cases,
    "sum_of_squares": bench_norm.cases,
    "gaussian_transport": bench_gaussian.cases,
    "mixture_denoise": bench_mixture.cases,
    "modulated_norm": bench_tokens.norms,
    "gated_residual": bench_tokens.residuals,
    "rms_norm_rope": bench_tokens.ropes,
    "geglu": bench_glu.cases,
    "group_norm_silu": bench_group_norm.cases,
    "normal": bench_noise.cases,
    "density_ratio_weight": bench_density_ratio.cases,
}


def choose(names: str | None) -> list[str]:
    """The ops named in a comma-separated list; all without one.

    Raises:
        ValueError: for a name that no op has.
    """
    chosen = list(OPS) if names is None else names.split(",")
    unknown = [name for name in chosen if name not in OPS]
    if unknown:
        raise ValueError(f"there is no benchmark of {', '.join(unknown)}; ops are {', '.join(OPS)}")
    return chosen


def find_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: for another name than cpu and cuda, and for a GPU that is not there.
    """
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name}; expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no GPU here")
    return torch.device(name)


def run(
    ops: Sequence[str],
    device: torch.device,
    small: bool = False,
    quick: bool = False,
    until: float | None = None,
) -> Iterator[list[Row]]:
    """Measure all cases and yield the rows of each: first cases of all ops, then second ones, ...

    Args:
        ops: keys of `OPS`.
        device: where to run.
        small: tiny sizes, which show that everything works and nothing about speed.
        quick: the first case of each op alone, for a shorter time.
        until: `time.monotonic` after which cases are named and not run.
    """
    timer = timer_for(device)
    seconds, least_rounds = (0.02, 2) if small else (0.1, 3) if quick else (timer.seconds, 5)
    of_ops = [itertools.islice(OPS[op](device, small), 1 if quick else None) for op in ops]
    for case in itertools.chain.from_iterable(itertools.zip_longest(*of_ops)):
        if case is None:
            continue
        if until is not None and time.monotonic() > until:
            yield [Row(*identity(case), OURS, case.bytes_moved, note="not run: out of time")]
            continue
        yield measure(case, timer, seconds, least_rounds)
        # Compiled code is kept for a few shapes of a function only, and not needed again.
        torch.compiler.reset()


def ours_is_wrong(rows: Sequence[Row]) -> bool:
    """Whether one of our own results was refused."""
    return any(row.variant == OURS and row.note and row.microseconds is None for row in rows)
