"""Timestep laws: their ranges and distributions, in every process."""

from __future__ import annotations

import pytest
import torch

from fastdistill.diffusion import (
    EDM,
    VP,
    FixedList,
    KarrasIndex,
    LogitNormal,
    LogNormalSigma,
    Noise,
    RectifiedFlow,
    Uniform,
    karras_sigmas,
)

INDEX = torch.arange(20_000)


def draw(law, process):
    return law.sample(process, Noise(0), "t", INDEX)


@pytest.mark.parametrize("process", [EDM(), VP.stable_diffusion(), RectifiedFlow()], ids=str)
def test_log_normal_sigma_holds_in_every_process(process):
    alpha, sigma = process.alpha_sigma(draw(LogNormalSigma(-1.2, 0.6), process).double())
    log_ratio = (sigma / alpha).log()
    assert float(log_ratio.mean()) == pytest.approx(-1.2, abs=0.02)
    assert float(log_ratio.std()) == pytest.approx(0.6, abs=0.02)


def test_karras_index_draws_levels_of_the_grid():
    t = draw(KarrasIndex(2, 998), EDM())
    assert float(t.min()) == pytest.approx(0.0021, rel=0.05)
    assert float(t.max()) == pytest.approx(79.6, rel=0.01)
    levels = torch.tensor(sorted(karras_sigmas(1000)[:-1]))
    distance = (t[:200, None] / levels - 1).abs().amin(1)
    assert float(distance.max()) < 1e-4
    assert len(t.unique()) == pytest.approx(997, abs=10)


def test_uniform_is_an_index_for_vp_and_shifted_for_flow():
    t = draw(Uniform(0.02, 0.98), VP.dit())
    assert torch.equal(t, t.floor())
    assert (float(t.min()), float(t.max())) == (20, 979)
    shifted = draw(Uniform(), RectifiedFlow(3.0))
    assert float(shifted.median()) == pytest.approx(0.75, abs=0.01)


def test_logit_normal_has_its_median_at_the_sigmoid_of_the_mean():
    t = draw(LogitNormal(-0.4, 1.0), RectifiedFlow())
    assert float(t.median()) == pytest.approx(float(torch.sigmoid(torch.tensor(-0.4))), abs=0.01)


def test_fixed_list_draws_each_time_equally_often():
    t = draw(FixedList((999.0, 749.0, 499.0)), VP.dit())
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [499.0, 749.0, 999.0]
    assert (counts / len(INDEX) - 1 / 3).abs().max() < 0.02
