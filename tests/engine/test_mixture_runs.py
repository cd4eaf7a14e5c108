"""Runs on a mixture: exact teacher, scores against the truth, and the figure of the samples."""

from __future__ import annotations

import json
import re

import pytest
import torch

from fastdistill.config import Recipe, RecipeError, load_recipe
from fastdistill.data import MixtureData
from fastdistill.data.mixtures import ring
from fastdistill.diffusion import EDM
from fastdistill.engine import drawing
from fastdistill.engine.inputs import make_mixture
from fastdistill.engine.job import Job
from fastdistill.engine.plan_recipe import job_of_recipe
from fastdistill.engine.report import comparison
from fastdistill.engine.roles import RunNetworks
from fastdistill.engine.saved import DenoiserDescription, load_denoiser
from fastdistill.engine.scores import MixtureScores
from fastdistill.models import ExactDenoiser, ResidualCritic

SMALL = [
    "warmup=null",
    "model.width=16",
    "model.blocks=2",
    "teacher.training.steps=20",
    "teacher.training.batch_size=32",
    "teacher.training.student.warmup=5",
    "teacher.sampler_steps=4",
    "training.steps=20",
    "training.batch_size=32",
    "training.log_every=5",
    "training.sample_every=10",
    "training.student.warmup=5",
    "training.critic.warmup=5",
    "evaluation.samples=400",
    "evaluation.samples_during_training=200",
]


def small_recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "run"
    said: list[str] = []
    Job.create(folder, small_recipe("mixture_2d"), said.append).run()
    return folder, said


def test_a_run_says_how_far_its_student_is_from_the_truth(finished):
    folder, said = finished
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("reverse_kl", "forward_kl", "jensen_shannon", "modes_covered", "outliers"):
        for role in ("teacher", "student", "real"):
            assert f"{name}_{role}" in summary
    assert summary["modes_covered_real"] == 8
    assert abs(summary["reverse_kl_real"]) < 0.2
    assert summary["reverse_kl_student"] > 0.5, "twenty steps teach nothing"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "evaluation/reverse_kl" in row] == [10, 20]
    assert any("KL(student|truth)" in line for line in said)
    assert [row[0] for row in comparison(summary)][:2] == [
        "KL(samples ‖ truth)",
        "KL(truth ‖ samples)",
    ]


def test_a_run_draws_points_and_not_pictures(finished, tmp_path):
    folder, _ = finished
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "samples").glob("distill-*.png"))) == 2
    report = (folder / "report.html").read_text()
    assert "Divergence from the truth" in report
    assert not re.findall(r"(?:src|href)=\"(?!data:)", report)
    samples, pictures = drawing.draw(folder, 50)
    assert samples.shape == (50, 2)
    drawing.save_grid(tmp_path / "points.png", {"student": samples}, pictures)
    assert (tmp_path / "points.png").stat().st_size > 1000


def test_a_run_is_judged_again_with_the_exact_teacher(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    again = Job.open(folder, lambda line: None).evaluate()
    for name in ("reverse_kl_teacher", "reverse_kl_student", "sliced_wasserstein_real"):
        assert again[name] == pytest.approx(summary[name], rel=1e-6)


def test_scores_come_from_the_truth_and_networks_from_the_samples():
    """The frozen teacher is exact; student and critic are copies of the trained network."""
    recipe = small_recipe("mixture_2d")
    trained = DenoiserDescription.of(recipe, (2,), 0).build()
    networks = RunNetworks(recipe, trained)
    teacher = networks.teacher
    assert isinstance(teacher, ExactDenoiser)
    x, t = torch.randn(6, 2), torch.full((6,), 0.4)
    expected = ExactDenoiser(ring(), EDM())(x, t)
    torch.testing.assert_close(teacher(x, t), expected)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert networks.discriminator() is not None
    critic = networks.critic()
    assert isinstance(critic, ResidualCritic)
    assert critic.network.trained is trained
    assert networks.student.network is not trained.network
    alone = ["model.residual_critic=false", "teacher.exact=false"]
    networks = RunNetworks(small_recipe("mixture_2d", *alone), trained)
    assert networks.critic() is trained
    assert not isinstance(networks.teacher, ExactDenoiser)


def test_a_method_with_a_discriminator_runs_on_exact_scores(tmp_path):
    overrides = ["objective=f_distill", "training.sample_every=null"]
    Job.create(tmp_path / "run", small_recipe("mixture_2d", *overrides), lambda line: None).run()
    assert load_denoiser(tmp_path / "run" / "student").description.times == (2.5,)


def test_many_dimensions_are_judged_by_fits_of_the_modes(tmp_path):
    recipe = small_recipe("mixture_64d", "data.dimensions=8", "data.modes=3")
    summary = Job.create(tmp_path / "run", recipe, lambda line: None).run()
    assert summary is not None
    assert abs(summary["fitted_reverse_kl_real"]) < 0.3
    assert summary["fitted_reverse_kl_student"] > 1
    assert summary["modes_covered_real"] == 3
    assert "reverse_kl_student" not in summary


def test_scores_rank_the_truth_before_a_narrow_and_a_collapsed_student():
    data = MixtureData(ring())
    scores = MixtureScores(data, None, 0)  # type: ignore[arg-type]
    truth = data.batch(0, 0, 3000).samples
    centres = data.mixture.means.repeat_interleave(375, 0)
    narrow = scores.of(centres + 0.08 * torch.randn(3000, 2))
    one = scores.of(data.mixture.means[:1] + 0.15 * torch.randn(3000, 2))
    good = scores.of(truth)
    assert good["reverse_kl"] < 0.05 < narrow["reverse_kl"] < one["reverse_kl"]
    assert max(good["sliced_wasserstein"], narrow["sliced_wasserstein"]) < 0.2
    assert one["sliced_wasserstein"] > 1
    assert (good["modes_covered"], narrow["modes_covered"], one["modes_covered"]) == (8, 8, 1)
    assert narrow["reverse_kl_real"] == good["reverse_kl_real"], "one yardstick at one count"


def test_a_gaussian_is_a_mixture_of_one_that_a_recipe_can_name():
    recipe = small_recipe("mixture_64d", "data.modes=1", "data.dimensions=5")
    mixture = make_mixture(recipe.data)  # type: ignore[arg-type]
    assert mixture.means.shape == (1, 5)


@pytest.mark.parametrize("name", ["mixture_2d", "mixture_64d"])
def test_a_mixture_can_be_planned(name):
    job = job_of_recipe(load_recipe(name))
    objective = job.objective(False)
    assert {p.device.type for p in objective.student.parameters()} == {"meta"}
    assert {p.device.type for p in objective.networks()["teacher"].parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dimensions=3", "a ring lies in the plane"),
        ("data={name: digits}", "model mlp is for data mixture, but data is digits"),
        ("data.preset=rings", "preset"),
        ("teacher.guidance_scale=2", "guidance_scale"),
        ("model=digits", "model digits is for data digits, but data is mixture"),
    ],
)
def test_what_does_not_fit_a_mixture_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        small_recipe("mixture_2d", override)


def test_exact_scores_of_unknown_data_are_refused():
    with pytest.raises(RecipeError, match=r"teacher.exact needs data mixture, but data is digits"):
        load_recipe("digits", ["teacher.exact=true"])
