"""Whole runs: the folder that they leave, resumption from kill -9, and the command line."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import SMALL, small_recipe

from fastdistill.config import RecipeError
from fastdistill.engine.folder import check_folder
from fastdistill.engine.job import Job
from fastdistill.engine.saved import load_denoiser

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from fastdistill.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A small run from start to end, and how long it took."""
    folder = tmp_path_factory.mktemp("run") / "run"
    started = time.monotonic()
    done = command("train", "digits", *SMALL, "-o", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(folder)
    (folder.parent / "seconds").write_text(str(time.monotonic() - started))
    return folder


def test_a_run_leaves_everything_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("frechet_pixel", "frechet_features", "precision", "recall", "vendi"):
        assert summary[f"{name}_teacher"] >= 0 <= summary[f"{name}_student"]
    assert summary["evaluations_teacher"] == 7
    assert summary["evaluations_student"] == 1
    assert summary["peak_memory_gib"] > 0
    assert (finished / "grid.png").read_bytes().startswith(b"\x89PNG")
    report = (finished / "report.html").read_text()
    assert "Score gap by noise level" in report
    assert not re.findall(r"(?:src|href)=\"(?!data:)", report), "the report needs no other file"
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "teacher"] == [7, 14, 21, 28, 30]
    assert [row["step"] for row in rows if "evaluation/vendi" in row] == [20, 40]
    assert any((finished / "tensorboard" / "distill").iterdir())
    for name in ("teacher", "student"):
        check_folder(finished / name)
    assert load_denoiser(finished / "student").description.times == (2.5,)


@pytest.mark.slow
def test_twenty_kills_change_nothing(finished, tmp_path):
    """kill -9 at random moments, resumed each time: weights, EMA and metrics bitwise the same."""
    folder = tmp_path / "run"
    script = Path(__file__).with_name("kill_run.py")
    seconds = _seconds_of_work(finished, tmp_path)
    done = subprocess.run(
        [sys.executable, script, folder, "20", str(seconds), "1", *SMALL],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"killed (\d+) times", done.stdout)[1]) >= 15, done.stdout
    same = ["metrics.jsonl", "student/model.safetensors", "teacher/model.safetensors"]
    same += [
        str(file.relative_to(finished))
        for file in sorted((finished / "checkpoints").glob("*-*/*.safetensors"))
    ]
    for name in same:
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def _seconds_of_work(finished: Path, tmp_path: Path) -> float:
    """How long a run takes without the interpreter's start."""
    timings = (finished.parent / "seconds").read_text()
    started = time.monotonic()
    command("info")
    return max(float(timings) - (time.monotonic() - started), 1.0)


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    done = command("resume", folder)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "student/model.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = folder / "checkpoints" / "distill-000000040" / "shard-00000-of-00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    done = command("resume", folder)
    assert done.returncode == 0, done.stderr
    assert "refusing checkpoint distill-000000040" in done.stdout
    assert "resuming stage distill at step 32" in done.stdout
    for name in ("metrics.jsonl", "student/model.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_run_is_not_continued_with_another_teacher(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "teacher")
    shutil.copytree(finished / "student", folder / "teacher")  # of the same architecture
    with pytest.raises(RecipeError, match=r"teacher .* has other weights than when .*000040 was"):
        Job.open(folder, lambda line: None).run()


def test_a_saved_teacher_is_used_where_it_fits_and_refused_where_not(finished, tmp_path):
    saved = f"teacher={finished / 'teacher'}"
    job = Job.create(tmp_path / "run", small_recipe(saved), lambda line: None)
    teacher = job._take_teacher()
    own = load_denoiser(finished / "teacher").denoiser
    for name, value in own.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value)
    for override in ("model.width=48", "process.sigma_max=70", "parametrisation.sigma_data=1"):
        with pytest.raises(RecipeError, match="but the recipe has"):
            Job.create(tmp_path / override, small_recipe(saved, override), lambda line: None)
        assert not (tmp_path / override).exists(), "nothing is left behind"


def test_a_folder_that_holds_something_is_left_alone(finished):
    before = sorted(path.name for path in finished.iterdir())
    done = command("train", "digits", "-o", finished)
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert "fastdistill resume" in done.stderr
    assert sorted(path.name for path in finished.iterdir()) == before


def test_a_second_process_is_kept_out(tmp_path):
    job = Job.create(tmp_path / "run", small_recipe(), lambda line: None)
    with (job.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process"):
            job.run()


def test_sample_and_evaluate_use_the_saved_student(finished, tmp_path):
    path = tmp_path / "x.npy"
    assert command("sample", finished, "--count", 12, "-o", path).returncode == 0
    import numpy

    first = numpy.load(path)
    assert first.shape == (12, 1, 8, 8)
    command("sample", finished, "--count", 12, "--seed", 0, "-o", path)
    assert (numpy.load(path) == first).all()
    grid = command("sample", finished, "--label", 3, "-o", tmp_path / "x.png")
    assert grid.returncode == 0
    assert (tmp_path / "x.png").exists()
    done = command("evaluate", finished)
    assert done.returncode == 0
    assert "Fréchet distance, pixels" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "training.stepz=3"], "did you mean 'steps'"),
        (["train", "digit"], "did you mean 'digits'"),
        (["train", "digits", "device=cuda:7"], "torch sees"),
        (["train", "digits", "device=tpu"], "expected auto, cpu, cuda"),
        (["resume", "nowhere"], "holds no run"),
        (["sample", "nowhere"], "has no readable manifest"),
    ],
)
def test_a_wrong_command_ends_with_one_clear_message(arguments, message, tmp_path):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.rglob("recipe.yaml")), "nothing is left behind"


def test_info_names_versions_backends_and_what_is_missing():
    done = command("info")
    assert done.returncode == 0
    for word in ("torch", "triton", "backend cpu", "backend reference", "GPU"):
        assert word in done.stdout


def test_a_batch_that_the_gpu_cannot_hold_ends_with_one_sentence(tmp_path, monkeypatch, capsys):
    """torch's error, which no machine without a GPU raises by itself, becomes advice."""
    from fastdistill import cli

    job = Job.create(tmp_path / "run", small_recipe(), lambda line: None)

    def run() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(job, "run", run)
    with pytest.raises(SystemExit) as ended:
        cli._run(job)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "too little memory for training.batch_size=" in said
    assert "`fastdistill plan` says what fits" in said
    assert "more\n" not in said
