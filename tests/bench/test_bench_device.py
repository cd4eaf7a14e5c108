"""`bench.device` without a device: its stages, budgets and results."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import device, suite
from bench.bench_norm import cases as norm_cases
from bench.harness import OURS, Variant
from bench.timers import CpuTimer

CPU = torch.device("cpu")


@pytest.fixture
def options(tmp_path):
    return device.Options(tmp_path, CPU, small=True, seconds=100.0)


@pytest.fixture
def one_op(monkeypatch):
    monkeypatch.setattr(suite, "OPS", {"sum_of_squares": norm_cases})


def test_budgets_fit_the_whole_time():
    left = 100.0
    for name in ("tests", "sync", "graphs", "suite", "memcheck", "racecheck"):
        left -= device._budget(name, left, 100.0)
    assert left == pytest.approx(0.0, abs=1e-6)


def test_the_suite_takes_what_quick_stages_leave():
    assert device._budget("suite", 90.0, 100.0) == pytest.approx(72.0)
    assert device._budget("tests", 10.0, 100.0) == 10.0
    assert device._budget("racecheck", -5.0, 100.0) == 1.0


def stage(options, code, budget=20.0, name="tests"):
    class Fake(device.Options):
        def command(self, stage, seconds):
            return [sys.executable, "-c", code]

    log = options.output / "log.txt"
    log.touch()
    fake = Fake(options.output, options.device, options.small, options.seconds)
    return device._run_stage(name, fake, budget, log)


def test_a_stage_is_told_by_its_exit_status_and_its_last_line(options):
    outcome = stage(options, "print('many'); print('3 passed | 1 skipped')")
    assert (outcome.status, outcome.summary) == ("passed", "3 passed / 1 skipped")
    assert stage(options, "raise SystemExit(3)").status == "failed with exit status 3"
    assert stage(options, "raise SystemExit(5)").status == "skipped"
    assert stage(options, "raise SystemExit(5)", name="suite").status.startswith("failed")
    assert "many" in (options.output / "log.txt").read_text()


def test_a_stage_that_hangs_is_ended(options):
    outcome = stage(options, "print('begun', flush=True); import time; time.sleep(60)", budget=3.0)
    assert outcome.status == "out of time"
    assert outcome.summary == "begun"


def test_a_missing_program_is_skipped(options, monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    assert stage(options, "").status == "skipped"


def test_all_stages_are_reported_where_one_fails(options, monkeypatch):
    def run(name, options, budget, log):
        return device.Outcome(name, "failed" if name == "sync" else "passed", 1.0, "done")

    monkeypatch.setattr(device, "_run_stage", run)
    device.run_all(options)
    content = json.loads((options.output / "results.json").read_text())
    assert [found["status"] for found in content["stages"]] == ["passed", "failed", *["passed"] * 4]
    assert {"date", "torch", "command"} <= content["machine"].keys()
    assert "| sync | failed | 1 | done |" in (options.output / "results.md").read_text()


def test_sync_and_graphs_pass_and_name_what_fails(options, one_op, monkeypatch, capsys):
    assert device.check_sync(options)
    assert device.check_graphs(options)
    assert "sum_of_squares 1,000 float32: right" in capsys.readouterr().out
    case = next(norm_cases(CPU, True))
    counter = iter(range(100))
    case.variants[OURS] = Variant(lambda _: lambda: (torch.tensor(float(next(counter))),))
    assert device._replay_equals_eager(case, CpuTimer()) is not None
    monkeypatch.setattr(suite, "OPS", {"sum_of_squares": lambda *_: iter((case,))})
    assert not device.check_graphs(options)
    assert "1 faults" in capsys.readouterr().out


@pytest.mark.slow
def test_the_suite_stage_saves_its_rows(options, one_op):
    assert device.run_suite(options)
    device._write(options.output, {"device": "cpu"}, [])
    content = json.loads((options.output / "results.json").read_text())
    assert {found["op"] for found in content["rows"]} == {"sum_of_squares"}


@pytest.mark.parametrize("name", ["tests", "sync", "suite", "memcheck"])
def test_commands_are_whole(options, name):
    command = options.command(name, 12.0)
    if name in device.STAGES:
        assert command[-5:] == ["--device", "cpu", "--seconds", "12", "--small"]
    if name == "memcheck":
        assert command[0] == "compute-sanitizer"
