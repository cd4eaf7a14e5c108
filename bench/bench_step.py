"""A training cycle of reduced networks beside the loop of DMD2 and FastGen, on a CPU, in one run.

    python -m bench.bench_step --output docs/results

writes ``cpu-step.md`` and ``cpu-step.json``. A cycle is one student update and five critic updates
(`bench.cycles` has both loops). Times are CPU seconds of one thread, which other programs disturb
less than the clock on the wall: the median of cycles that the loops do in turns, in an order that
is drawn anew each round. Memory is what tensors take: what is held from cycle to cycle, and the
most that a cycle has at once.

On a CPU the networks take nearly all the time, and in float32: what a GPU gains from fewer
launches, from no waiting and from bfloat16 without casts does not show here; `bench.device_step`
is for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.counters import bytes_of, count
from bench.cycles import Cycle, EagerCycle, OurCycle, Setting
from bench.timers import Bystanders

EAGER, OURS = "eager loop", "fastdistill"
SHARED: dict[str, Any] = {"matching": {"share_critic_forward": True}}
REUSED: dict[str, Any] = {"training": {"sample_reuse": 4}}
DROPPED: dict[str, Any] = {"training": {"drop_gradients": True}}
ALL: dict[str, Any] = SHARED | {"training": {"sample_reuse": 4, "drop_gradients": True}}

VARIANTS: dict[str, Callable[[Setting], Cycle]] = {
    EAGER: lambda setting: EagerCycle(setting, "float32"),
    "eager loop, autocast over float32 weights": lambda s: EagerCycle(s, "autocast"),
    OURS: lambda setting: OurCycle(setting, "float32"),
    "fastdistill, accelerate": lambda setting: OurCycle(setting, "float32", accelerated=True),
    "fastdistill, share_critic_forward": lambda s: OurCycle(s, "float32", **SHARED),
    "fastdistill, sample_reuse: 4": lambda setting: OurCycle(setting, "float32", **REUSED),
    "fastdistill, drop_gradients": lambda s: OurCycle(s, "float32", **DROPPED),
    "fastdistill, all four": lambda s: OurCycle(s, "float32", True, **ALL),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One loop on one setting."""

    setting: str
    parameters: int
    variant: str
    seconds: float
    spread: float
    ratio: float
    held: int
    peak: int
    kernels: int
    waits: int


def measure(setting: Setting, rounds: int) -> list[Row]:
    """All variants on one setting, with cycles in turns."""
    cycles = {name: make(setting) for name, make in VARIANTS.items()}
    for cycle in cycles.values():
        cycle.run()
    seconds: dict[str, list[float]] = {name: [] for name in cycles}
    order, shuffle = list(cycles), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start = time.process_time()
            cycles[name].run()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    parameters = sum(value.numel() for value in _networks(cycles[EAGER])["student"].parameters())
    rows = []
    for name, cycle in cycles.items():
        found, held = sorted(seconds[name]), bytes_of(cycle.held())
        counts = count(cycle.run, cycle.on_host())
        rows.append(
            Row(
                setting.label,
                parameters,
                name,
                medians[name],
                (found[-1 - len(found) // 4] - found[len(found) // 4]) / 2 / medians[name],
                medians[EAGER] / medians[name],
                held,
                held + counts.peak,
                counts.kernels,
                counts.waits,
            )
        )
    return rows


def _networks(cycle: Any) -> dict[str, torch.nn.Module]:
    return cycle.networks


def markdown(facts: machine.Machine, rows: list[Row]) -> str:
    """The page."""
    lines = ["# A training cycle on a CPU", "", *(__doc__ or "").splitlines()[4:], ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        lines += ["", f"## {setting}: {own[0].parameters / 1e6:.1f} million parameters", ""]
        lines += [
            "| | seconds a cycle | eager loop's time / its | MiB held | MiB at most | kernels | "
            "values read by the host |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in own:
            lines.append(
                f"| {row.variant} | {row.seconds:.2f} ± {100 * row.spread:.0f} % | "
                f"{row.ratio:.2f} | {row.held / 2**20:.0f} | {row.peak / 2**20:.0f} | "
                f"{row.kernels:,} | {row.waits} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rounds", type=int, default=9, help="cycles of each loop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, bystanders = torch.device("cpu"), Bystanders()
    settings = [Setting("sdxl", 2, True, device), Setting("dit_xl2_512", 4, True, device)]
    rows = [row for setting in settings for row in measure(setting, arguments.rounds)]
    facts = machine.describe(device)
    facts["cores that other programs kept busy"] = f"{100 * bystanders.share():.0f} %"
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "rows": [dataclasses.asdict(row) for row in rows]}
    (arguments.output / "cpu-step.json").write_text(json.dumps(content, indent=1) + "\n")
    page = markdown(facts, rows)
    (arguments.output / "cpu-step.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
