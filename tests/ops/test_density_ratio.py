"""`density_ratio_weight`: calibration, history, and the divergence's weights."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill.objectives import get_divergence
from fastdistill.ops import density_ratio_weight, log_snr_bin, use_backend

BACKENDS = ["reference", "cpu", "triton"]


def options(name: str) -> dict[str, float]:
    divergence = get_divergence(name)
    return {
        "power": divergence.power,
        "c0": divergence.c0,
        "c1": divergence.c1,
        "exponent": divergence.exponent,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    ["reverse_kl", "jensen_shannon", "softened_reverse_kl", "jeffreys", "alpha:-1", "le_cam"],
)
def test_weight_is_h_of_the_ratio_with_mean_one(name, backend):
    logits = torch.linspace(-2, 2, 9)
    bins = torch.zeros(9, dtype=torch.int64)
    with use_backend(backend):
        result = density_ratio_weight(
            logits, bins, torch.zeros(1, 2), decay=0.0, prior=0.0, ratio_min=0.0, **options(name)
        )
    ratio = logits.exp() / logits.exp().mean()
    h = get_divergence(name).h(ratio)
    torch.testing.assert_close(result.ratio, ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.weight, h / h.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_several_heads_are_averaged_and_everything_is_clamped(backend):
    logits = torch.tensor([[30.0, 10.0], [-30.0, -10.0], [1.0, -1.0]])
    bins = torch.zeros(3, dtype=torch.int64)
    with use_backend(backend):
        result = density_ratio_weight(
            logits, bins, torch.zeros(1, 2), decay=0.0, prior=0.0, **options("forward_kl")
        )
    raw = torch.tensor([20.0, 0.1, 1.0])
    torch.testing.assert_close(result.ratio, raw / raw.mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_history_decays_by_bin_and_counts(backend):
    history = torch.tensor([[8.0, 4.0], [0.0, 0.0], [3.0, 6.0]])
    bins = torch.tensor([0, 0, 1])
    logits = torch.tensor([0.0, math.log(3.0), math.log(2.0)])
    with use_backend(backend):
        result = density_ratio_weight(
            logits, bins, history, decay=0.5, prior=1.0, **options("forward_kl")
        )
    expected = torch.tensor([[4 + 1 + 3, 2 + 2], [2.0, 1.0], [1.5, 3.0]])
    torch.testing.assert_close(result.history, expected)
    means = torch.tensor([(8 + 1) / (4 + 1), (2 + 1) / (1 + 1)])
    torch.testing.assert_close(result.ratio, torch.tensor([1, 3, 2]) / means[bins])
    assert history[0, 0] == 8, "the old history is left alone"


def test_a_sample_alone_in_a_new_bin_keeps_its_signal():
    """Divided by its own mean it would be 1 whatever the discriminator says."""
    logits = torch.tensor([math.log(5.0), math.log(0.2)])
    bins = torch.tensor([0, 1])
    result = density_ratio_weight(logits, bins, torch.zeros(2, 2), **options("forward_kl"))
    assert result.ratio[0] > 1.5 > 0.7 > result.ratio[1]


def test_ratios_of_samples_of_the_student_average_to_one():
    """E_q[p / q] = 1, so calibration leaves an exact discriminator as it is."""
    generator = torch.Generator().manual_seed(0)
    x = 0.8 + 0.78 * torch.randn(200_000, generator=generator)
    log_p = -(x**2) / (2 * 1.25) - 0.5 * math.log(1.25)
    log_q = -((x - 0.8) ** 2) / (2 * 0.78**2) - math.log(0.78)
    bins = torch.zeros(len(x), dtype=torch.int64)
    result = density_ratio_weight(
        log_p - log_q,
        bins,
        torch.zeros(1, 2),
        ratio_min=0.0,
        ratio_max=1e9,
        **options("jensen_shannon"),
    )
    mean = float(result.history[0, 0] / result.history[0, 1])
    assert mean == pytest.approx(1.0, abs=0.02)


def test_bins_divide_log_snr_evenly_and_clamp():
    sigma = torch.tensor([1e3, 1.0, 1e-4, math.exp(-0.99), math.exp(-1.01)])
    bins = log_snr_bin(torch.ones(5), sigma, 10, -10.0, 10.0)
    assert bins.tolist() == [0, 5, 9, 5, 6]


def test_wrong_inputs_are_refused():
    good = (torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"bin_index is torch\.float32"):
        density_ratio_weight(good[0], torch.zeros(3), good[2], power=1.0)
    with pytest.raises(ValueError, match="history has shape"):
        density_ratio_weight(good[0], good[1], torch.zeros(2), power=1.0)
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        density_ratio_weight(*good, power=1.0, decay=1.5)
