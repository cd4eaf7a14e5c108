"""Metrics: means on the device, rows that survive a resume, and sampling for the result."""

from __future__ import annotations

import json

import pytest
import torch

from fastdistill.diffusion import EDM, VP, X0, Noise, RectifiedFlow
from fastdistill.engine import sampling
from fastdistill.engine.metrics import JSONLines, MetricBuffer
from fastdistill.engine.sampling import Conditions
from fastdistill.models import Denoiser


def test_means_are_over_everything_since_the_last_reading():
    buffer = MetricBuffer(torch.device("cpu"), bins=3)
    buffer.add("student", {"loss": torch.tensor([1.0, 3.0]), "norm": torch.tensor(5.0)})
    buffer.add("student", {"loss": torch.tensor([5.0])})
    buffer.add_by_level("student", {"loss": torch.tensor([1.0, 3.0])}, torch.tensor([0, 2]))
    assert buffer.read() == {
        "student/loss": 3.0,
        "student/loss/by_level": [1.0, None, 3.0],
        "student/norm": 5.0,
    }
    assert buffer.read() == {"student/loss/by_level": [None, None, None]}


def test_order_of_a_row_does_not_depend_on_what_came_first():
    rows = []
    for names in (("a", "b"), ("b", "a")):
        buffer = MetricBuffer(torch.device("cpu"), bins=1)
        for name in names:
            buffer.add("x", {name: torch.tensor(1.0)})
        rows.append(json.dumps(buffer.read()))
    assert rows[0] == rows[1]


def test_rows_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    log = JSONLines(path)
    log.write({"step": 1, "loss": float("nan")})
    length = log.commit()
    log.write({"step": 2})
    log.close()
    again = JSONLines(path)
    again.truncate(length)
    again.write({"step": 3})
    assert path.read_text() == '{"step":1,"loss":null}\n{"step":3}\n'
    with pytest.raises(ValueError, match="was cut or replaced"):
        again.truncate(10_000)


class _Gaussian(Denoiser):
    """Denoiser of N(0.5, 0.25) in any process."""

    def __init__(self, process):
        super().__init__(torch.nn.Identity(), process, X0())
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t, t, condition=None):
        alpha, sigma = (value.view(-1, 1) for value in self.process.alpha_sigma(t))
        return 0.5 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x_t - alpha * 0.5)


@pytest.mark.parametrize(
    "process", [EDM(), VP.dit(), VP.stable_diffusion(), RectifiedFlow()], ids=str
)
def test_teachers_of_every_process_are_sampled_over_the_range_that_they_have(process):
    images = sampling.sample_teacher(_Gaussian(process), 24, Conditions(), 4000, (1,), Noise(0))
    assert float(images.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(images.std()) == pytest.approx(0.5, rel=0.05)


def test_samples_do_not_depend_on_how_many_are_drawn_at_once():
    student = _Gaussian(EDM())
    many = sampling.sample_student(student, (2.5,), Conditions(), 1300, (1,), Noise(0))
    few = sampling.sample_student(student, (2.5,), Conditions(), 10, (1,), Noise(0))
    assert torch.equal(many[:10], few)
    apart = sampling.sample_student(student, (2.5,), Conditions(), 10, (1,), Noise(0), batch=3)
    assert torch.equal(apart, few)


class _Shifted(_Gaussian):
    """Denoiser of N(c, 0.25) for a condition c [B]; 0 is the null condition."""

    def forward(self, x_t, t, condition=None):
        alpha, sigma = (value.view(-1, 1) for value in self.process.alpha_sigma(t))
        mean = condition["mean"].view(-1, 1)
        return mean + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x_t - alpha * mean)


def test_guidance_moves_a_gaussian_teacher_past_its_condition():
    """Of two Gaussians of one variance guidance makes a third, whose mean is extrapolated."""
    count = 4000
    given = {"mean": torch.full((count,), 0.5)}
    conditions = Conditions(given, {"mean": torch.zeros(count)})
    images = sampling.sample_teacher(
        _Shifted(EDM()), 24, conditions, count, (1,), Noise(0), batch=1500, guidance_scale=3.0
    )
    assert float(images.mean()) == pytest.approx(1.5, abs=0.03)
    assert float(images.std()) == pytest.approx(0.5, rel=0.05)
