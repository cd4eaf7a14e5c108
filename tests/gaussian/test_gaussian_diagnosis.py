"""The diagnosis of teachers whose distance to a Gaussian is known."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.image import imread
from test_gaussian_model import some_gaussian, some_mixture
from torch import nn

from fastdistill.diffusion import EDM, VP, X0, RectifiedFlow
from fastdistill.gaussian import diagnose, noise_levels
from fastdistill.models import Denoiser


class Analytic(nn.Module):
    """A network that predicts x0 as a distribution's exact denoiser, off by a factor."""

    def __init__(self, gaussian, process, factor=1.0):
        super().__init__()
        self.gaussian, self.process, self.factor = gaussian, process, factor
        self.weight = nn.Parameter(torch.zeros(()))
        self.labels = []

    def forward(self, x, t, condition):
        self.labels.append(condition)
        return self.factor * self.gaussian.denoise(x, *self.process.alpha_sigma(t), condition)


def teacher(gaussian, process=None, factor=1.0):
    process = process or EDM()
    return Denoiser(Analytic(gaussian, process, factor), process, X0())


def data(gaussian, count=400):
    generator = torch.Generator().manual_seed(0)
    return gaussian.sample(torch.randn(count, 1, 2, 3, generator=generator))


@pytest.mark.parametrize("process", [EDM(), VP.dit(), RectifiedFlow()], ids=["edm", "vp", "flow"])
def test_a_teacher_that_is_the_gaussian_has_no_error(process):
    gaussian = some_gaussian(dtype=torch.float32)
    found = diagnose(teacher(gaussian, process), gaussian, data(gaussian))
    assert max(found.score_errors) < 1e-5
    assert found.level(1e-4) == found.ratios[0]


def test_errors_are_those_of_the_closed_form():
    """A teacher of D = c D_G, mu = 0: both errors are quotients of variances."""
    gaussian = some_gaussian(dtype=torch.float32)
    gaussian.mean.zero_()
    factor, ratio = 1.5, 2.0
    found = diagnose(
        teacher(gaussian, factor=factor), gaussian, data(gaussian, 20_000), [ratio], batch=20_000
    )
    spectrum = torch.cat((gaussian.variances, torch.full((3,), gaussian.floor)))
    total = spectrum + ratio**2
    gain = spectrum / total
    gap = float(((factor - 1) * gain).square() @ total)
    score = math.sqrt(gap / float((factor * gain - 1).square() @ total))
    assert found.score_errors[0] == pytest.approx(score, rel=0.03)
    assert found.denoiser_errors[0] == pytest.approx((factor - 1) / factor, rel=1e-4)


def test_a_mixture_is_gaussian_in_much_noise_alone():
    """Far components: the one Gaussian of their moments errs in little noise, the mixture never."""
    mixture = some_mixture().float()
    parts = [data(mixture[k], 300) for k in range(3)]
    samples = torch.cat([part + 4.0 * (k - 1) for k, part in enumerate(parts)])
    for k in range(3):
        mixture[k].mean += 4.0 * (k - 1)
    from fastdistill.gaussian import fit_gaussian

    one = fit_gaussian([samples], rank=6).float()
    found = diagnose(teacher(mixture), one, samples)
    assert found.score_errors[-1] < 0.01 < found.score_errors[len(found.ratios) // 2]
    level = found.level(0.05)
    assert 0.1 < level < 80
    above = [error for r, error in zip(found.ratios, found.score_errors, strict=True) if r >= level]
    assert max(above) <= 0.05
    assert found.score_errors[found.ratios.index(level) - 1] > 0.05
    own = diagnose(teacher(mixture), mixture, samples)
    assert max(own.score_errors) < 1e-4
    assert diagnose(teacher(mixture), one, samples, [0.5, 1.0]).level(0.001) is None


def test_guidance_is_that_of_the_mixtures_classes():
    mixture = some_mixture(by_class=True).float()
    labels = torch.arange(300) % 3
    samples = torch.cat([data(mixture[0], 300)])
    options = {"condition": labels, "uncondition": torch.full_like(labels, 3)}
    found = diagnose(teacher(mixture), mixture, samples, guidance_scale=2.0, **options)
    assert max(found.score_errors) < 1e-4
    assert found.guidance_scale == 2.0
    with pytest.raises(ValueError, match="needs int64 labels"):
        diagnose(teacher(mixture), mixture, samples)
    with pytest.raises(ValueError, match="expected rising ones"):
        diagnose(teacher(mixture), mixture, samples, [1.0, 0.5], **options)


def test_levels_are_what_the_process_reaches_and_the_plot_is_drawn(tmp_path):
    gaussian = some_gaussian(dtype=torch.float32)
    for process, highest in ((EDM(), 80.0), (VP.stable_diffusion(), 14.6), (RectifiedFlow(), 80.0)):
        levels = noise_levels(teacher(gaussian, process), 9)
        assert levels == sorted(levels)
        assert levels[-1] == pytest.approx(highest, rel=0.01)
    found = diagnose(teacher(gaussian, factor=1.1), gaussian, data(gaussian, 50))
    found.save_plot(tmp_path / "plot.png", bound=0.02)
    assert imread(tmp_path / "plot.png").std() > 0
    assert found.as_json()["log_snrs"][0] == pytest.approx(-2 * math.log(found.ratios[0]))
