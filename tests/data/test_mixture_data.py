"""Mixtures as data: a function of (seed, step), of about unit variance, and the same everywhere."""

from __future__ import annotations

import pytest
import torch

from fastdistill.data.mixtures import MixtureData, correlated, ring


def test_a_batch_depends_on_seed_and_step_alone():
    data = MixtureData(ring())
    first = data.batch(1, 5, 16).samples
    assert torch.equal(MixtureData(ring()).batch(1, 5, 16).samples, first)
    for other in (data.batch(2, 5, 16), data.batch(1, 6, 16)):
        assert not torch.isclose(other.samples, first).any()


def test_ranks_share_the_batch_of_one_process():
    data = MixtureData(correlated(3, 4))
    whole = data.batch(0, 1, 12)
    parts = [data.batch(0, 1, 12, slice(4 * rank, 4 * rank + 4)).samples for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole.samples)
    assert whole.condition is None
    assert data.shape == (4,)


def test_streams_share_nothing():
    data, index = MixtureData(ring()), torch.arange(8)
    assert not torch.isclose(
        data.draw(0, 0, index, "truth").samples, data.draw(0, 0, index, "yardstick").samples
    ).any()


@pytest.mark.parametrize("mixture", [ring(), correlated(), correlated(1, 5)])
def test_presets_have_about_unit_variance(mixture):
    samples = MixtureData(mixture).batch(0, 0, 20_000).samples
    spread = samples.var(0).mean()
    if len(mixture.means) == 1:
        spread = spread + (1 - 0.3942)  # a Gaussian has no spread of means
    assert float(spread) == pytest.approx(1.0, abs=0.2)


def test_modes_of_the_ring_are_far_apart_and_round():
    mixture = ring(8, 0.15)
    distances = torch.cdist(mixture.means, mixture.means)
    nearest = distances.fill_diagonal_(9).min()
    assert float(nearest) == pytest.approx(2 * 2**0.5 * 0.3826834, rel=1e-5)
    torch.testing.assert_close(mixture.covariances, 0.0225 * torch.eye(2).expand(8, 2, 2))


def test_correlated_components_differ_in_axes_and_weights():
    mixture = correlated(4, 16)
    correlation = mixture.covariances[0] / mixture.covariances[0].diagonal().mean()
    off = correlation - correlation.diagonal().diag()
    assert float(off.abs().max()) > 0.2
    assert float((mixture.covariances[0] - mixture.covariances[1]).abs().max()) > 0.2
    spectra = torch.linalg.eigvalsh(mixture.covariances.double())
    torch.testing.assert_close(spectra[0], spectra[1], rtol=1e-4, atol=1e-6)
    assert float(spectra.max() / spectra.min()) == pytest.approx(10, rel=1e-3)
    assert float(mixture.log_weights.max() - mixture.log_weights.min()) > 0.1


def test_the_fixed_seed_gives_the_same_mixture_always():
    """Numbers of the first component, so that results of different machines can be compared."""
    mixture = correlated()
    assert mixture.means.shape == (10, 64)
    assert torch.equal(mixture.means, correlated().means)
    torch.testing.assert_close(mixture.means[0, :3], torch.tensor(FIRST), rtol=1e-4, atol=1e-5)


FIRST = [0.33593, -1.02711, 0.12197]


def test_a_ring_of_points_is_refused():
    with pytest.raises(ValueError, match="deviation is 0"):
        ring(8, 0.0)
