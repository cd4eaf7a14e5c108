"""A training cycle at full size on one GPU: the trainer, the eager loop, each lever alone.

    python -m bench.device_step --output DIR                          on a machine with a GPU
    python -m bench.device_step --output DIR --device cpu --small     to prove this script

SDXL with random weights at batch 1, 2 and 6, DiT-XL/2 at 256 and 512 pixels; bfloat16. Each row
(a setting and a variant) runs in a process of its own, so that one that runs out of memory takes no
other with it, the most telling rows first; what is left when the time is up is listed as not run.
A row has the cycle's time, images a second (student samples a student's update), peak memory, and
for the trainer the share of its parts. ``device-step.json`` and ``device-step.md`` are written
anew after every row. On a CPU nothing is captured and times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.cycles import Cycle, EagerCycle, OurCycle, Setting
from fastdistill.objectives import Update
from fastdistill.optim import OptimizerStep

SECONDS = 9.0 * 60
ROW_SECONDS = 100.0
SETTINGS = [("sdxl", 2), ("dit_xl2_512", 16), ("sdxl", 1), ("sdxl", 6), ("dit_xl2_256", 16)]
"""Model and batch, in the order of what they tell."""

GRAPH: dict[str, Any] = {"training": {"cuda_graph": True}}
BLOCKS: dict[str, Any] = {"training": {"compile": "blocks"}}


def _ours(accelerated: bool = False, **options: Any) -> Callable[[Setting], Cycle]:
    return lambda setting: OurCycle(setting, "bfloat16", accelerated, **options)


VARIANTS: dict[str, Callable[[Setting], Cycle]] = {
    "eager loop": lambda setting: EagerCycle(setting, "bfloat16"),
    "fastdistill": _ours(),
    "fastdistill, cuda_graph": _ours(**GRAPH),
    "fastdistill, all exact": _ours(True, training={"cuda_graph": True, "drop_gradients": True}),
    "fastdistill, all": _ours(
        True,
        training={"cuda_graph": True, "drop_gradients": True, "sample_reuse": 4},
        matching={"share_critic_forward": True},
    ),
    "eager loop, autocast over float32 weights": lambda s: EagerCycle(s, "autocast"),
    "eager loop, compiled blocks": lambda s: EagerCycle(s, "bfloat16", compiled=True),
    "fastdistill, accelerate": _ours(True),
    "fastdistill, compile: blocks": _ours(**BLOCKS),
    "fastdistill, drop_gradients": _ours(training={"drop_gradients": True}),
    "fastdistill, share_critic_forward": _ours(matching={"share_critic_forward": True}),
    "fastdistill, sample_reuse: 4": _ours(training={"sample_reuse": 4}),
    "fastdistill, cuDNN attention first": _ours(),
    "fastdistill, moments: 8bit": _ours(training={"moments": "8bit"}),
}


class Clock:
    """Seconds of parts of a cycle, by CUDA events or by the clock on the wall."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        """A mark in the device's time."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is launched in this context as a part."""
        start = self.now()
        yield
        self._marks.append((name, start, self.now()))

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two marks."""
        if not self._gpu:
            return end - start
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def parts(self) -> dict[str, float]:
        """Seconds of all parts by name."""
        found: dict[str, float] = {}
        for name, start, end in self._marks:
            found[name] = found.get(name, 0.0) + self.between(start, end)
        return found


@contextlib.contextmanager
def _timing(cycle: OurCycle, clock: Clock) -> Iterator[None]:
    """Let the parts of the trainer's steps count their time."""
    trainer = cycle.trainer
    objective = trainer.objective

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with clock.part(name):
                return call(*args, **kwargs)

        return run

    places: list[tuple[Any, str, str]] = [
        (objective, "generate", "student's forward"),
        (objective, "student_update", "teacher's and critic's forward, gradient of the sample"),
        (objective, "critic_update", "critic's forward and loss"),
        (Update, "backward", "backward"),
        (OptimizerStep, "apply", "optimizer"),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, part in places:
        setattr(place, name, timed(part, getattr(place, name)))
    try:
        yield
    finally:
        for place, name, old in before:
            if place is objective:
                delattr(place, name)
            else:
                setattr(place, name, old)


@contextlib.contextmanager
def _attention(variant: str) -> Iterator[None]:
    """torch's order of attention kernels, or cuDNN's before all others."""
    if "cuDNN" not in variant:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    order = [getattr(SDPBackend, name) for name in kernels]
    with sdpa_kernel(order, set_priority=True):
        yield


def measure(setting: Setting, variant: str, seconds: float) -> dict[str, Any]:
    """One row: at least three cycles after the warm-up, and at most those that fit."""
    clock, gpu = Clock(setting.device), setting.device.type == "cuda"
    graph = "cuda_graph" in variant or ", all" in variant
    with _attention(variant):
        cycle = VARIANTS[variant](setting)
        for _ in range(4 if graph else 2):  # with a graph: two eager steps of each kind, capture
            cycle.run()
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < 3 or (time.monotonic() < end and len(times) < 20):
            start = clock.now()
            cycle.run()
            times.append(clock.between(start, clock.now()))
        row: dict[str, Any] = {
            "seconds": statistics.median(times),
            "spread": (max(times) - min(times)) / 2 / statistics.median(times),
            "images_per_second": setting.batch / statistics.median(times),
        }
        if gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if isinstance(cycle, OurCycle) and not graph:
            with _timing(cycle, clock):
                cycle.run()
            row["parts"] = clock.parts()
    return row


def run_row(setting: Setting, variant: str, seconds: float) -> dict[str, Any]:
    """One row in a process of its own."""
    command = [sys.executable, "-m", "bench.device_step", "--row", variant]
    command += ["--model", setting.model, "--batch", str(setting.batch)]
    command += ["--device", str(setting.device), *(["--small"] if setting.small else [])]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=machine.CHECKOUT, capture_output=True, text=True, timeout=seconds
        )
        lines = done.stdout.strip().splitlines()
        failed = (done.stderr.strip().splitlines() or ["no output"])[-1]
        found = json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": failed}
    except subprocess.TimeoutExpired:
        found = {"failed": f"took longer than {seconds:.0f} s"}
    return {
        "setting": setting.label,
        "variant": variant,
        **found,
        "whole_seconds": time.monotonic() - begin,
    }


def rows_in_order(device: torch.device, small: bool) -> Iterator[tuple[Setting, str]]:
    """Eager loop, trainer and all levers of every setting first; then each lever alone."""
    settings = [Setting(model, 2 if small else size, small, device) for model, size in SETTINGS]
    names, graphs = list(VARIANTS), device.type == "cuda"
    telling = 5
    for chosen in (names[:telling], names[telling:]):
        for setting in settings:
            for name in chosen:
                if graphs or not ("cuda_graph" in name or ", all" in name):
                    yield setting, name


def markdown(facts: machine.Machine, rows: list[dict[str, Any]]) -> str:
    """The page."""
    lines = ["# A training cycle on a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        eager = next((row.get("seconds") for row in own if row["variant"] == "eager loop"), None)
        lines += ["", f"## {setting}", ""]
        lines.append("| | ms a cycle | eager loop's time / its | images/s | peak GiB | |")
        lines.append("|---|---:|---:|---:|---:|---|")
        lines += [_line(row, eager) for row in own]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], eager: float | None) -> str:
    if "failed" in row:
        return f"| {row['variant']} | | | | | {row['failed'].replace('|', '/')[:120]} |"
    whole = row["seconds"]
    ratio = f"{eager / whole:.2f}" if eager else ""
    memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
    parts = row.get("parts", {})
    shares = ", ".join(f"{name} {100 * part / whole:.0f} %" for name, part in parts.items())
    time_ = f"{1e3 * whole:.1f} ± {100 * row['spread']:.0f} %"
    images = f"{row['images_per_second']:.2f}"
    return f"| {row['variant']} | {time_} | {ratio} | {images} | {memory} | {shares} |"


def run_all(device: torch.device, small: bool, seconds: float, output: Path) -> None:
    """Every row while time lasts; results are written after each."""
    output.mkdir(parents=True, exist_ok=True)
    facts, rows = machine.describe(device), []
    end = time.monotonic() + seconds
    for setting, variant in rows_in_order(device, small):
        left = end - time.monotonic()
        if left < 10:
            rows.append({"setting": setting.label, "variant": variant, "failed": "not run"})
        else:
            rows.append(run_row(setting, variant, min(left, ROW_SECONDS)))
            print(json.dumps(rows[-1]), flush=True)
        content = {"machine": facts, "rows": rows}
        (output / "device-step.json").write_text(json.dumps(content, indent=1) + "\n")
        (output / "device-step.md").write_text(markdown(facts, rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to prove the script")
    parser.add_argument("--small", action="store_true", help="reduced networks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--row", choices=VARIANTS, help="measure one row in this process")
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.row:
        setting = Setting(arguments.model, arguments.batch, arguments.small, device)
        print(json.dumps(measure(setting, arguments.row, seconds=5.0)))
        return
    if arguments.output is None:
        parser.error("--output is missing: the folder of the results")
    run_all(device, arguments.small, arguments.seconds, arguments.output)


if __name__ == "__main__":
    main()
