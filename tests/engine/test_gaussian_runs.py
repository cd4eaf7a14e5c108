"""Runs whose student starts from a Gaussian, or whose teacher has a stand-in; and the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small import small_recipe
from typer.testing import CliRunner

from fastdistill.cli import app
from fastdistill.config import RecipeError
from fastdistill.data import digits
from fastdistill.diffusion import Noise
from fastdistill.engine import judge
from fastdistill.engine.export import export
from fastdistill.engine.gaussian import FitSettings, fit_source
from fastdistill.engine.job import Job
from fastdistill.engine.sampling import EVALUATION_STEP, sample_student
from fastdistill.engine.saved import load_denoiser
from fastdistill.engine.scores import Scores
from fastdistill.gaussian import GaussianMixture, fit_gaussian, load_gaussian, save_gaussian


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def unjudged():
    """Runs without the digits' scores, which take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            judge, "scores_of", lambda data, pictures, seed, _: Scores(data, pictures, seed)
        )
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """One Gaussian of the digits, and one of each class."""
    folder = tmp_path_factory.mktemp("gaussians")
    save_gaussian(folder / "one.safetensors", fit_source("digits", FitSettings(rank=20), say=quiet))
    by_class = fit_source("digits", FitSettings(rank=20, by_class=True), say=quiet)
    save_gaussian(folder / "classes.safetensors", by_class)
    return folder


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Path:
    """A run with both, from start to end."""
    folder = tmp_path_factory.mktemp("run") / "run"
    recipe = small_recipe(
        f"start_noise={files / 'one.safetensors'}",
        f"objective.stand_in={{gaussian: {files / 'classes.safetensors'}, above: 2.5}}",
        *("training.steps=16", "teacher.training.steps=10", "evaluation.samples=100"),
    )
    Job.create(folder, recipe, quiet).run()
    return folder


def test_the_summary_says_what_the_stand_in_saved_and_cost(finished):
    summary = json.loads((finished / "summary.json").read_text())
    # ln(2.5) is (0.9163 + 0.5) / 1.2 = 1.18 standard deviations above the law's mean
    assert summary["teacher_share"] == pytest.approx(1 - 0.119, abs=0.001)
    assert 0 < summary["stand_in_score_error"] < 1
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    shares = [row["student/teacher_share"] for row in rows if "student/teacher_share" in row]
    assert shares
    assert shares == pytest.approx([28 / 32] * len(shares))


def test_a_saved_student_starts_as_it_was_trained(files, finished):
    student = load_denoiser(finished / "student").denoiser
    gaussian = load_gaussian(files / "one.safetensors")
    assert torch.equal(student.start.mean, gaussian.mean)
    labels = torch.arange(6)
    from fastdistill.engine.sampling import Conditions

    noise = Noise(0).at(EVALUATION_STEP)
    made = sample_student(student, (2.5,), Conditions(labels), 6, (1, 8, 8), noise)
    z = noise.normal("latents", labels, (1, 8, 8))
    with torch.no_grad():
        expected = student(gaussian.marginal(z, 1.0, 2.5), torch.full((6,), 2.5), labels)
    assert torch.equal(made, expected)
    assert not torch.equal(student(2.5 * z, torch.full((6,), 2.5), labels), expected)


def test_a_run_continues_bitwise(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "distill-000000016")
    shutil.rmtree(folder / "student")
    Job.open(folder, quiet).run()
    for name in ("student/model.safetensors", "student/start.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_what_diffusers_cannot_start_is_not_exported(finished, tmp_path):
    with pytest.raises(ValueError, match="starts from a Gaussian's marginal"):
        export(finished, tmp_path / "out", teacher=tmp_path)


def test_a_mixture_is_no_start(files, tmp_path):
    job = Job.create(
        tmp_path / "run", small_recipe(f"start_noise={files / 'classes.safetensors'}"), quiet
    )
    with pytest.raises(RecipeError, match="is a mixture"):
        job.run()


def run(*arguments: object):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def test_the_commands_fit_and_diagnose(finished, tmp_path):
    file = tmp_path / "g.safetensors"
    done = run("gaussian", "fit", "digits", "--to", file, "--rank", 8, "--threads", 1)
    assert "1797 samples, rank 8" in done.output
    expected = fit_gaussian([digits().samples], rank=8).float()
    torch.testing.assert_close(load_gaussian(file).mean, expected.mean)
    picture = tmp_path / "d.png"
    done = run(
        *("gaussian", "diagnose", file, "--teacher", finished / "teacher", "--data", "digits"),
        *("--count", 50, "--levels", 4, "--bound", 100, "-o", picture),
    )
    assert "at most 100 from sigma / alpha = 0.01 on" in done.output
    numbers = json.loads(picture.with_suffix(".json").read_text())
    assert len(numbers["score_errors"]) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_teachers_own_samples_are_fitted_by_class_and_by_cluster(finished, tmp_path):
    settings = {"rank": 5, "count": 60, "sampler_steps": 3, "batch_size": 25}
    teacher = str(finished / "teacher")
    mixture = fit_source(teacher, FitSettings(by_class=True, **settings), say=quiet)
    assert isinstance(mixture, GaussianMixture)
    assert [mixture[k].fit.samples for k in range(10)] == [6] * 10
    assert mixture[0].fit.process["name"] == "edm"
    clusters = fit_source(teacher, FitSettings(clusters=2, **settings), say=quiet)
    assert sum(clusters[k].fit.samples for k in range(2)) == 60


def test_images_are_fitted_as_signed_pixels(tmp_path):
    from PIL import Image

    for k in range(6):
        Image.new("RGB", (4, 4), (0, 51 * k, 255)).save(tmp_path / f"{k}.png")
    found = fit_source(str(tmp_path), FitSettings(rank=3, size=4), say=quiet)
    assert found.rank == 1
    torch.testing.assert_close(
        found.mean[:, 0, 0], torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), atol=1e-6, rtol=0
    )
    with pytest.raises(ValueError, match="give --size"):
        fit_source(str(tmp_path), FitSettings(rank=3), say=quiet)
