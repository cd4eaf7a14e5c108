"""Expected perturbation scores: the published value, closed forms, and the MMD of two sets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion import EDM, GaussianMixture, Noise, Process
from fastdistill.diffusion.process import AlphaSigma
from fastdistill.evaluate import eps_mmd, expected_perturbation_score
from fastdistill.models import ExactDenoiser


@dataclasses.dataclass(frozen=True)
class ContinuousVP(EDM):
    """beta from 0.1 to 20 over t in [0, 1], as in the paper."""

    def alpha_sigma(self, t: Tensor) -> AlphaSigma:
        alpha = (-0.5 * (0.1 * t + 0.5 * 19.9 * t**2)).exp()
        return AlphaSigma(alpha, (1 - alpha**2).sqrt())


def gaussian(mean: float, variance: float, process: Process, d: int = 1) -> ExactDenoiser:
    one = torch.ones(1, d, dtype=torch.float64)
    return ExactDenoiser(GaussianMixture(mean * one, variance * one, dtype=torch.float64), process)


def test_the_published_value():
    """METHODS 12: mu .3, v .5, x 1.1, t = 1/1000 ... 20/1000: -1.59408."""
    teacher = gaussian(0.3, 0.5, ContinuousVP())
    times = [k / 1000 for k in range(1, 21)]
    x = torch.tensor([[1.1]], dtype=torch.float64)
    found = expected_perturbation_score(teacher, x, times, Noise(0, "cpu"))
    assert float(found) == pytest.approx(-1.59408, abs=5e-6)


def test_of_a_gaussian_it_is_linear_in_the_sample():
    """A mean and a scale: -mean_t[1 / (v + sigma^2)] (x - mu) in EDM, at any noise."""
    teacher = gaussian(-0.4, 0.8, EDM(), d=3)
    x = torch.randn(5, 3, dtype=torch.float64)
    found = expected_perturbation_score(teacher, x, [0.2, 1.0], Noise(7, "cpu"))
    gain = 0.5 * (1 / (0.8 + 0.04) + 1 / (0.8 + 1.0))
    torch.testing.assert_close(found, -gain * (x + 0.4))


def test_of_a_mixture_it_averages_over_the_noise():
    mixture = GaussianMixture(
        torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.1], [0.1]]), dtype=torch.float64
    )
    teacher = ExactDenoiser(mixture, EDM())
    x = torch.full((20_000, 1), 0.3, dtype=torch.float64)
    found = expected_perturbation_score(teacher, x, [0.5], Noise(1, "cpu")).mean()
    eps = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    weight = torch.exp(-0.5 * eps**2)
    noised = (0.3 + 0.5 * eps)[:, None]
    score = teacher.score(noised, torch.full((4001,), 0.5, dtype=torch.float64))[:, 0]
    expected = float((weight * score).sum() / weight.sum())
    assert float(found) == pytest.approx(expected, abs=0.02)


def test_the_distance_tells_drifted_samples_from_the_datas_own():
    teacher = gaussian(0.0, 1.0, EDM(), d=2)
    torch.manual_seed(0)
    real, fresh = torch.randn(2, 400, 2, dtype=torch.float64)

    def scores(samples: Tensor) -> Tensor:
        return expected_perturbation_score(teacher, samples, [0.05, 0.1], Noise(0, "cpu"))

    same = eps_mmd(scores(real), scores(fresh))
    assert abs(same) < 0.01
    assert eps_mmd(scores(real), scores(fresh + 0.5)) > 0.05
    assert eps_mmd(scores(real), scores(1.5 * fresh)) > 0.02
    assert eps_mmd(scores(real), scores(real)) < 0


def test_the_distance_has_no_unit():
    x, y = torch.randn(50, 3), torch.randn(50, 3) + 1
    assert eps_mmd(100 * x, 100 * y) == pytest.approx(eps_mmd(x, y), rel=1e-5)


def test_bad_input_is_refused():
    teacher = gaussian(0.0, 1.0, EDM())
    x = torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="times is empty"):
        expected_perturbation_score(teacher, x, [], Noise(0, "cpu"))
    with pytest.raises(ValueError, match="has no noise"):
        expected_perturbation_score(teacher, x, [0.0], Noise(0, "cpu"))
    with pytest.raises(ValueError, match="not finite"):
        expected_perturbation_score(teacher, x / 0, [1.0], Noise(0, "cpu"))
