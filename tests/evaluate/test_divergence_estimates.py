"""Divergences: closed forms, estimates against them, and the bias that estimates have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from fastdistill.data.mixtures import ring
from fastdistill.diffusion import GaussianMixture
from fastdistill.evaluate import (
    divergences,
    fitted_divergences,
    gaussian_kl,
    modes,
    neighbour_divergences,
    neighbour_log_density,
    sliced_wasserstein,
    wasserstein,
)


def normal(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def clean(count: int) -> tuple[Tensor, Tensor]:
    return torch.ones(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)


def law(d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> MultivariateNormal:
    factor = normal(d, d, seed)
    covariance = scale**2 * (0.3 * factor @ factor.T + torch.eye(d, dtype=torch.float64))
    return MultivariateNormal(torch.full((d,), shift, dtype=torch.float64), covariance)


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 7])
def test_kl_of_gaussians_is_torchs(d):
    p, q = law(d, 1), law(d, 2, shift=0.5, scale=1.3)
    found = gaussian_kl(p.mean, p.covariance_matrix, q.mean, q.covariance_matrix)
    assert found == pytest.approx(float(kl_divergence(p, q)), rel=1e-10)


def test_kl_to_a_gaussian_without_volume_is_refused():
    one, flat = torch.eye(2), torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="not positive definite"):
        gaussian_kl(torch.zeros(2), one, torch.zeros(2), flat)


def test_known_densities_give_both_kl_and_jensen_shannon():
    """One dimension by quadrature: N(0, 1) and N(1, 0.8^2)."""
    p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.0, 0.8)
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    step = float(grid[1] - grid[0])
    a, b = p.log_prob(grid).exp(), q.log_prob(grid).exp()
    middle = (a + b) / 2
    jensen = 0.5 * float((a * (a / middle).log() + b * (b / middle).log()).sum()) * step
    torch.manual_seed(0)
    x, y = p.sample((200_000,)).double(), q.sample((200_000,)).double()
    found = divergences(p.log_prob(x), q.log_prob(x), p.log_prob(y), q.log_prob(y))
    assert found.reverse_kl == pytest.approx(float(kl_divergence(q, p)), rel=0.02)
    assert found.forward_kl == pytest.approx(float(kl_divergence(p, q)), rel=0.02)
    assert found.jensen_shannon == pytest.approx(jensen, rel=0.02)


def test_jensen_shannon_of_separate_laws_is_log_two():
    far, zero = torch.full((10,), -1000.0), torch.zeros(10)
    assert divergences(zero, far, far, zero).jensen_shannon == pytest.approx(math.log(2))
    assert divergences(zero, zero, zero, zero) == (0.0, 0.0, 0.0)


# --- densities by neighbours ----------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 5, 10])
def test_the_density_by_neighbours_has_the_variance_that_is_taken_off(k):
    """Of uniform samples there is no curvature: no mean error, and psi'(k) of variance."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(40_000, 2, generator=generator, dtype=torch.float64)
    points = 0.2 + 0.6 * torch.rand(5000, 2, generator=generator, dtype=torch.float64)
    found = neighbour_log_density(points, samples, k)
    expected = float(torch.special.polygamma(1, torch.tensor(float(k))))
    assert float(found.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(found.var()) == pytest.approx(expected, rel=0.08)


def test_a_sample_is_not_its_own_neighbour():
    samples = normal(500, 2, seed=0)
    own = neighbour_log_density(samples, k=2)
    others = torch.stack(
        [
            neighbour_log_density(samples[i : i + 1], torch.cat((samples[:i], samples[i + 1 :])), 2)
            for i in range(20)
        ]
    )
    torch.testing.assert_close(own[:20], others[:, 0])


def test_repeated_samples_have_an_infinite_density():
    samples = torch.zeros(50, 2)
    assert torch.isinf(neighbour_log_density(samples)).all()
    p = normal(50, 2, seed=1)
    found = neighbour_divergences(p, samples, torch.zeros(50), torch.zeros(50))
    assert found.reverse_kl == math.inf
    assert math.isfinite(found.forward_kl)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("count", [2000, 20_000])
def test_estimates_of_gaussians_are_near_the_closed_form(d, count):
    """Another mean and another scale; the error is the statistical one, without a visible bias."""
    p, q = law(d, 3), law(d, 4, shift=0.4, scale=0.8)
    torch.manual_seed(count + d)
    x, y = p.sample((count,)), q.sample((count,))
    found = neighbour_divergences(x, y, p.log_prob(x), p.log_prob(y))
    tolerance = 6 / math.sqrt(count)
    assert found.reverse_kl == pytest.approx(float(kl_divergence(q, p)), abs=tolerance)
    assert found.forward_kl == pytest.approx(float(kl_divergence(p, q)), abs=2 * tolerance)
    exact = divergences(p.log_prob(x), q.log_prob(x), p.log_prob(y), q.log_prob(y))
    assert found.jensen_shannon == pytest.approx(exact.jensen_shannon, abs=tolerance)


def test_fresh_samples_of_the_truth_score_zero():
    """On the eight modes, where the uncorrected estimate is off by 0.05 at this count."""
    mixture = ring(8, 0.15).double()
    scores, plain = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        x, y = _draw(mixture, 2000), _draw(mixture, 2000)
        at_x, at_y = (mixture.log_density(v, *clean(2000)) for v in (x, y))
        scores.append(neighbour_divergences(x, y, at_x, at_y))
        plain.append(float((neighbour_log_density(y) - at_y).mean()))
    means = torch.tensor(scores).mean(0)
    assert means.abs().max() < 0.015, means
    assert sum(plain) / 8 > 0.04


def _draw(mixture: GaussianMixture, count: int) -> Tensor:
    chosen = torch.multinomial(mixture.log_weights.exp(), count, replacement=True)
    eps = torch.randn(count, mixture.dimensions, 1, dtype=torch.float64)
    return mixture.means[chosen] + (mixture.factors[chosen] @ eps)[:, :, 0]


def test_a_dropped_mode_costs_forward_kl_and_an_invented_one_reverse_kl():
    mixture = ring(4, 0.2).double()
    torch.manual_seed(0)
    truth = _draw(mixture, 4000)
    three = _draw(
        GaussianMixture(mixture.means[:3], mixture.covariances[:3], dtype=torch.float64), 4000
    )
    at_truth, at_three = (mixture.log_density(v, *clean(4000)) for v in (truth, three))
    dropped = neighbour_divergences(truth, three, at_truth, at_three)
    assert dropped.reverse_kl == pytest.approx(math.log(4 / 3), abs=0.05)
    assert dropped.forward_kl > 1
    exact = 0.5 * (0.25 * math.log(2) + 0.75 * math.log(6 / 7) + math.log(8 / 7))
    assert dropped.jensen_shannon == pytest.approx(exact, abs=0.02)


# --- modes ----------------------------------------------------------------------------------------


def test_modes_of_the_truth_are_all_covered_with_their_weights():
    mixture = ring()
    torch.manual_seed(0)
    found = modes(_draw(mixture.double(), 8000), mixture)
    assert found.covered == 8
    assert 0.85 < found.weight_min <= 1 <= found.weight_max < 1.15
    assert found.outliers == pytest.approx(1e-3, abs=1.2e-3)


def test_samples_between_the_modes_cover_none():
    mixture = ring(4).double()
    torch.manual_seed(0)
    middle = (mixture.means + mixture.means.roll(1, 0)) / 2
    samples = middle.repeat(100, 1) + 0.02 * torch.randn(400, 2, dtype=torch.float64)
    found = modes(samples, mixture)
    assert found.covered == 0
    assert found.outliers == 1.0


def test_a_rare_mode_is_not_covered():
    mixture = ring(4, 0.15).double()
    torch.manual_seed(0)
    three = _draw(
        GaussianMixture(mixture.means[:3], mixture.covariances[:3], dtype=torch.float64), 1000
    )
    few = torch.cat((three, mixture.means[3:].repeat(20, 1)))
    found = modes(few, mixture)
    assert found.covered == 3
    assert found.weight_min == pytest.approx(20 / 1020 / 0.25)
    more = torch.cat((three, mixture.means[3:].repeat(100, 1)))
    assert modes(more, mixture).covered == 4


def separate(d: int) -> GaussianMixture:
    """Three correlated modes that do not overlap, with weights of their own."""
    factors = normal(3 * d, d, seed=5).reshape(3, d, d)
    covariances = 0.02 * (factors @ factors.mT) + 0.02 * torch.eye(d, dtype=torch.float64)
    means = torch.zeros(3, d, dtype=torch.float64)
    means[:, :3] = 10 * torch.eye(3, dtype=torch.float64)
    return GaussianMixture(means, covariances, torch.tensor([1.0, 2.0, 3.0]), torch.float64)


def test_gaussian_fits_of_the_modes_have_no_bias():
    """16 dimensions, 300 samples: fits alone would be off by d (d + 3) / 4 n = 0.76 nats."""
    truth = separate(16)
    found = []
    for seed in range(30):
        torch.manual_seed(seed)
        found.append(fitted_divergences(_draw(truth, 300), truth))
    means = torch.tensor(found).mean(0)
    assert means.abs().max() < 0.06, means


def test_gaussian_fits_of_moved_and_stretched_modes_are_near_the_closed_form():
    truth = separate(6)
    moved = GaussianMixture(
        truth.means + 0.1, 1.3 * truth.covariances, torch.tensor([1.0, 1.0, 1.0]), torch.float64
    )
    torch.manual_seed(0)
    found = fitted_divergences(_draw(moved, 20_000), truth)
    w, v = truth.log_weights.exp().tolist(), [1 / 3] * 3
    reverse = forward = 0.0
    for k in range(3):
        p, q = (MultivariateNormal(m.means[k], m.covariances[k]) for m in (truth, moved))
        reverse += v[k] * (math.log(v[k] / w[k]) + float(kl_divergence(q, p)))
        forward += w[k] * (math.log(w[k] / v[k]) + float(kl_divergence(p, q)))
    assert found.reverse_kl == pytest.approx(reverse, rel=0.05)
    assert found.forward_kl == pytest.approx(forward, rel=0.05)


def test_a_dropped_mode_makes_the_fitted_forward_kl_infinite():
    truth = separate(4)
    two = GaussianMixture(truth.means[:2], truth.covariances[:2], dtype=torch.float64)
    torch.manual_seed(0)
    found = fitted_divergences(_draw(two, 2000), truth)
    assert found.forward_kl == math.inf
    assert found.reverse_kl == pytest.approx(0.5 * math.log(3) + 0.5 * math.log(1.5), abs=0.05)


# --- Wasserstein ----------------------------------------------------------------------------------


def test_wasserstein_of_a_shifted_set_is_the_shift_in_every_direction():
    a = normal(60, 5, seed=1)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0], dtype=torch.float64)
    assert wasserstein(a, (a + shift).flip(0)) == pytest.approx(5.0)
    # a direction sees shift . u, whose mean square is |shift|^2 / d
    assert sliced_wasserstein(a, (a + shift).flip(0), 4000) == pytest.approx(5 / 5**0.5, rel=0.05)


def test_wasserstein_of_stretched_samples():
    """W_2 of x and s x is |s - 1| of x's root mean square, as the matching is the identity."""
    a = normal(80, 3, seed=1)
    expected = 0.5 * float(a.square().sum(1).mean().sqrt())
    assert wasserstein(a, 1.5 * a) == pytest.approx(expected)
    assert sliced_wasserstein(a, 1.5 * a, 4000) == pytest.approx(expected / 3**0.5, rel=0.05)


def test_sliced_and_exact_agree_in_one_dimension():
    a, b = normal(50, 1, seed=1), 2 * normal(50, 1, seed=2) + 1
    assert sliced_wasserstein(a, b, 3) == pytest.approx(wasserstein(a, b))


def test_bad_input_is_refused():
    a = normal(10, 2, seed=1)
    with pytest.raises(ValueError, match="expected one size"):
        wasserstein(a, a[:5])
    with pytest.raises(ValueError, match="directions is 0"):
        sliced_wasserstein(a, a, 0)
    with pytest.raises(ValueError, match="k is 0"):
        neighbour_log_density(a, k=0)
    with pytest.raises(ValueError, match="at least 6 are needed"):
        neighbour_log_density(a[:3])
    broken = a.clone()
    broken[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        modes(broken, ring())
