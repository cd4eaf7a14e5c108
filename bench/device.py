"""The whole device tier in one command, inside ten minutes on one GPU.

    python -m bench.device --output DIR                          on a machine with a GPU
    python -m bench.device --output DIR --device cpu --small     to prove this script

Stages, each in a process of its own with a budget, so that one that fails, hangs or breaks the
GPU's context takes no other with it:

    tests       the tests of tests/device
    sync        every op under `torch.cuda.set_sync_debug_mode("error")`: none waits for the host
    graphs      every op captured once and replayed on other inputs, equal to eager bit for bit
    suite       the benchmarks, timed with CUDA events
    memcheck    compute-sanitizer on one small test of each op, where it is installed
    racecheck   the same for races in shared memory

``results.json`` and ``results.md`` hold what each stage found, with date, GPU, driver, versions
and command; they are written anew after every stage. ``log.txt`` holds all output. On a CPU,
kernels run in Triton's interpreter, nothing is captured, and times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine, results, suite
from bench.harness import LATENT_BYTES, OURS, Case, Row, generator, identity, tensors
from bench.results import Report
from bench.timers import Timer, timer_for
from fastdistill.ops import use_backend

MINUTES = 9.5
SHARES = {"tests": 0.25, "sync": 0.1, "graphs": 0.07, "memcheck": 0.1, "racecheck": 0.08}
"""Most that a stage may take of the whole time; the suite takes what is left over."""
SUITE_MARGIN = 30.0
"""Seconds that the suite keeps for the case that it is in when its time is up."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What all stages need to know."""

    output: Path
    device: torch.device
    small: bool
    seconds: float

    def command(self, stage: str, seconds: float) -> list[str]:
        """The command that runs a stage in a process of its own."""
        # Options of pyproject.toml are for plugins that may be missing.
        pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts="]
        if stage == "tests":
            where = ["tests/device", "-m", "device"]
            return [*pytest, *where, "--continue-on-collection-errors"]
        if stage in ("memcheck", "racecheck"):
            sanitizer = ["compute-sanitizer", "--tool", stage, "--error-exitcode", "9"]
            return [
                *sanitizer,
                *pytest,
                "tests/bench/test_bench_cases.py",
                "-k",
                "ours and float32",
            ]
        command = [sys.executable, "-m", "bench.device", "--stage", stage]
        command += ["--output", str(self.output), "--device", str(self.device)]
        return [*command, "--seconds", f"{seconds:.0f}", *(["--small"] if self.small else [])]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    name: str
    status: str
    seconds: float
    summary: str


def run_all(options: Options) -> list[Outcome]:
    """Run every stage, and write what is known after each."""
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "log.txt"
    log.write_text("")
    (options.output / "bench.json").unlink(missing_ok=True)
    facts = machine.describe(options.device)
    end = time.monotonic() + options.seconds
    outcomes: list[Outcome] = []
    for name in ("tests", "sync", "graphs", "suite", "memcheck", "racecheck"):
        budget = _budget(name, end - time.monotonic(), options.seconds)
        outcomes.append(_run_stage(name, options, budget, log))
        print(f"{name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        _write(options.output, facts, outcomes)
    return outcomes


def _budget(name: str, left: float, whole: float) -> float:
    later = SHARES["memcheck"] + SHARES["racecheck"]
    wanted = left - later * whole if name == "suite" else SHARES[name] * whole
    return max(min(wanted, left), 1.0)


def _run_stage(name: str, options: Options, budget: float, log: Path) -> Outcome:
    """Run a stage within a budget; its whole process group ends with it."""
    command = options.command(name, budget - min(SUITE_MARGIN, budget / 2))
    if shutil.which(command[0]) is None:
        return Outcome(name, "skipped", 0.0, f"{command[0]} is not installed")
    gpu = options.device.type == "cuda"
    environment = os.environ | {"TRITON_INTERPRET": "0" if gpu else "1", "PYTHONUNBUFFERED": "1"}
    if not gpu:
        environment["FASTDISTILL_DEVICE_TESTS"] = "cpu"
    if name.endswith("check"):
        # Every tensor in an allocation of its own, so that what lies beside it is out of bounds.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start, begin = time.monotonic(), log.stat().st_size
    with log.open("a") as stream:
        stream.write(f"===== {name}: {' '.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            command,
            cwd=machine.CHECKOUT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=budget)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    summary = lines[-1].replace("|", "/")
    return Outcome(name, _status(name, code), time.monotonic() - start, summary)


def _status(name: str, code: int | None) -> str:
    if code is None:
        return "out of time"
    if name == "tests" and code == 5:
        return "skipped"  # pytest found no such test
    return "passed" if code == 0 else f"failed with exit status {code}"


def _write(folder: Path, facts: machine.Machine, outcomes: list[Outcome]) -> None:
    bench = folder / "bench.json"
    rows = Report.load(bench).rows if bench.exists() else []
    stages = [dataclasses.asdict(outcome) for outcome in outcomes]
    content = {"machine": facts, "stages": stages}
    content["rows"] = [dataclasses.asdict(row) for row in rows]
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["# Device tier", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| stage | outcome | seconds | last line |", "|---|---|---:|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} | {o.summary} |" for o in outcomes]
    lines += ["", results.FOOTNOTE, "", results.markdown(rows)]
    (folder / "results.md").write_text("\n".join(lines))


def check_sync(options: Options) -> bool:
    """Whether no op reads a tensor's value on the host."""
    mode = torch.cuda.set_sync_debug_mode if options.device.type == "cuda" else lambda _: None

    def check(case: Case, timer: Timer) -> str | None:
        run = case.variants[OURS].bind(case.make(generator(timer.device)))
        run()  # the first call compiles
        mode("error")
        try:
            run()
        finally:
            mode("default")
        return None

    return _check_every_op(options, check)


def check_graphs(options: Options) -> bool:
    """Whether every op, captured on one set of inputs, equals eager when replayed on another."""
    return _check_every_op(options, _replay_equals_eager)


def _replay_equals_eager(case: Case, timer: Timer) -> str | None:
    inputs, others = (case.make(generator(timer.device, seed)) for seed in (0, 1))
    run = case.variants[OURS].bind(inputs)
    kept: list[Any] = []

    def keep() -> None:
        kept[:] = run()

    replay = timer.capture([keep]) if timer.captures else keep
    fresh = case.make(generator(timer.device, 1))
    for mine, other in zip(tensors(inputs), tensors(fresh), strict=True):
        mine.copy_(other)
    replay()
    expected = case.variants[OURS].bind(others)()
    pairs = zip([*kept, *tensors(inputs)], [*expected, *tensors(others)], strict=True)
    different = [index for index, pair in enumerate(pairs) if not torch.equal(*pair)]
    return f"results {different} of the replay differ from eager" if different else None


def _check_every_op(options: Options, check: Callable[[Case, Timer], str | None]) -> bool:
    """Check the cases of latent size and below, and print a line for each."""
    timer, faults = timer_for(options.device), 0
    for cases in suite.OPS.values():
        for case in cases(options.device, options.small):
            if case.bytes_moved >= LATENT_BYTES:
                continue
            try:
                fault = check(case, timer)
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            faults += fault is not None
            print(f"{' '.join(identity(case))}: {fault or 'right'}", flush=True)
    print(f"{faults} faults")
    return faults == 0


def run_suite(options: Options) -> bool:
    """The benchmarks; the rows are saved after every case."""
    rows: list[Row] = []
    facts, console = machine.describe(options.device), results.wide_console()
    until = time.monotonic() + options.seconds
    for case in suite.run(list(suite.OPS), options.device, options.small, until=until):
        rows += case
        Report(facts, rows).save(options.output / "bench.json")
    for op in suite.OPS:
        console.print(results.table(op, [row for row in rows if row.op == op]))
    left_out = sum(row.note.startswith("not run") for row in rows)
    print(f"{len(rows)} rows, {left_out} cases not run for want of time")
    return not suite.ours_is_wrong([row for row in rows if not row.note.startswith("not run")])


STAGES: dict[str, Callable[[Options], bool]] = {
    "sync": check_sync,
    "graphs": check_graphs,
    "suite": run_suite,
}


@contextlib.contextmanager
def _kernels(device: torch.device) -> Iterator[None]:
    """On a CPU the Triton kernels too, in the interpreter."""
    with use_backend("triton") if device.type == "cpu" else contextlib.nullcontext():
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to prove the script")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=60 * MINUTES, help="time for everything")
    parser.add_argument("--stage", choices=STAGES, help="run one stage alone, in this process")
    arguments = parser.parse_args()
    try:
        where = suite.find_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    options = Options(arguments.output.resolve(), where, arguments.small, arguments.seconds)
    if arguments.stage:
        with _kernels(options.device):
            sys.exit(not STAGES[arguments.stage](options))
    outcomes = run_all(options)
    print(f"results.json, results.md and log.txt are in {options.output}")
    sys.exit(any(outcome.status not in ("passed", "skipped") for outcome in outcomes))


_Formatter = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
