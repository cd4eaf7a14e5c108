"""Runs that torchrun starts, as a person starts them, in good and in bad weather."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdistill.engine.checkpoint import CheckpointStore
from fastdistill.engine.job import STAGES

SETTINGS = [
    "threads=1",
    "model.width=32",
    "model.blocks=2",
    "teacher.training.steps=12",
    "teacher.training.batch_size=32",
    "teacher.sampler_steps=4",
    "training.steps=24",
    "training.batch_size=32",
    "training.log_every=6",
    "training.checkpoint_every=6",
    "training.sample_every=12",
    "training.student.lr=1.0e-4",
    "training.critic.lr=1.0e-4",
    "parallel.largest_unit=40000",
    "evaluation.samples=100",
    "evaluation.samples_during_training=100",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def start(processes: int, *arguments: str | Path) -> subprocess.Popen:
    """A job over several processes in a session of its own."""
    command = [*TORCHRUN, f"--nproc-per-node={processes}", "-m", "fastdistill", *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(processes: int, *arguments: str | Path) -> str:
    process = start(processes, *arguments)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run over two processes."""
    folder = tmp_path_factory.mktemp("job") / "run"
    output = run(2, "train", "digits", *SETTINGS, "--output", folder)
    assert output.count("run folder:") == 1
    return folder


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def test_a_job_over_two_processes_leaves_what_one_leaves(finished, tmp_path):
    folder = tmp_path / "alone"
    run(1, "train", "digits", *SETTINGS, "--output", folder)
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    for name, value in student(folder).items():
        torch.testing.assert_close(student(finished)[name], value, rtol=1e-3, atol=1e-5)
    mine, alone = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (finished, folder)
    )
    for row, wanted in zip(mine, alone, strict=True):
        assert row.keys() == wanted.keys()
        if "critic/loss" in row:
            assert row["critic/loss"] == pytest.approx(wanted["critic/loss"], rel=1e-4)


def start_and_wait_for_distillation(folder: Path) -> subprocess.Popen:
    """A job over two processes that has written a checkpoint of its second stage."""
    process = start(2, "train", "digits", *SETTINGS, "--output", folder)
    store = CheckpointStore(folder / "checkpoints", STAGES, keep=2)
    deadline = time.monotonic() + 120
    while not any(found.stage == "distill" for found in store._listed()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_a_killed_process_ends_the_job_and_it_resumes_bitwise(finished, tmp_path):
    folder = tmp_path / "run"
    process = start_and_wait_for_distillation(folder)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "fastdistill"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank 1 did not answer" in output
    assert f"continue with `fastdistill resume {folder}`" in output
    run(2, "resume", folder)
    for name, value in student(finished).items():
        assert torch.equal(student(folder)[name], value), name


def test_a_stopped_job_continues_with_another_number_of_processes(finished, tmp_path):
    folder = tmp_path / "run"
    process = start_and_wait_for_distillation(folder)
    process.terminate()  # torchrun tells every rank, each at another moment
    output, _ = process.communicate(timeout=60)
    assert "stopped in stage distill at step" in output
    assert "resuming stage distill at step" in run(1, "resume", folder)
    for name, value in student(finished).items():
        torch.testing.assert_close(student(folder)[name], value, rtol=1e-3, atol=1e-5)


def test_a_mode_that_does_not_fit_the_processes_is_refused(tmp_path):
    process = start(2, "train", "digits", *SETTINGS, "parallel.mode=single", "-o", tmp_path / "run")
    output, _ = process.communicate(timeout=60)
    assert "error: mode single is for one process, but there are 2" in output
