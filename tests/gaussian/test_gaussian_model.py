"""`Gaussian` and `GaussianMixture` against closed forms, autograd and the ODE; and their files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.integrate import solve_ivp

from fastdistill.diffusion import EDM, VP, RectifiedFlow
from fastdistill.gaussian import Fit, Gaussian, GaussianMixture, load_gaussian, save_gaussian

D = 6


def some_gaussian(rank=3, floor=0.3, seed=0, shape=(1, 2, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    d = torch.Size(shape).numel()
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    variances = torch.rand(rank, generator=generator, dtype=torch.float64).sort(descending=True)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    parts = (mean, basis[:, :rank].contiguous(), 3 * variances.values + 0.1)
    return Gaussian(*(part.to(dtype) for part in parts), floor)


def covariance(gaussian):
    rest = torch.eye(gaussian.mean.numel(), dtype=torch.float64) - gaussian.basis @ gaussian.basis.T
    return gaussian.basis * gaussian.variances @ gaussian.basis.T + gaussian.floor * rest


def test_published_value_of_the_teleport():
    """EDM, one dimension: mu = 0.5, variance 0.25, x = 40 from sigma 80 to 10 (METHODS 6 d)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    moved = Gaussian(0.5 * one[0], one, 0.25 * one[0]).transport(40 * one, 1.0, 80.0, 1.0, 10.0)
    assert float(moved) == pytest.approx(5.4435714692, abs=1e-10)


PROCESSES = {
    "edm": (EDM(), 20.0, 0.3),
    "vp": (VP.dit(), 900.0, 100.0),
    "flow": (RectifiedFlow(), 0.95, 0.1),
}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("rank", "floor"), [(D, 0.0), (3, 0.3), (2, 0.0), (0, 0.7)])
def test_transport_is_the_solution_of_the_ode(name, rank, floor):
    """The ODE of the full covariance, by an eighth-order solver, to 1e-10."""
    process, first, last = PROCESSES[name]
    gaussian = some_gaussian(rank, floor)
    levels = torch.tensor([first, last], dtype=torch.float64)
    (alpha, to_alpha), (sigma, to_sigma) = process.alpha_sigma(levels)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, 2, 3, generator=generator, dtype=torch.float64) * sigma
    full, mu = covariance(gaussian).numpy(), gaussian.mean.flatten().numpy()

    def slope(log_ratio, y):
        """In y = x_t / alpha and ln(sigma / alpha) every process has the ODE dy = y - D(y)."""
        ratio = np.exp(log_ratio)
        return ratio**2 * np.linalg.solve(full + ratio**2 * np.eye(D), y - mu)

    span = [float((s / a).log()) for a, s in ((alpha, sigma), (to_alpha, to_sigma))]
    start = (x / alpha).flatten().numpy()
    solved = solve_ivp(slope, span, start, "DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    moved = gaussian.transport(x, alpha, sigma, to_alpha, to_sigma).flatten()
    torch.testing.assert_close(moved, to_alpha * torch.from_numpy(solved), rtol=1e-10, atol=1e-10)


def test_transports_compose_and_invert():
    gaussian = some_gaussian()
    x = torch.randn(4, 1, 2, 3, dtype=torch.float64)
    a, b, c = (0.1, 0.99), (0.7, 0.5), (1.0, 0.2)
    via = gaussian.transport(gaussian.transport(x, *a, *b), *b, *c)
    torch.testing.assert_close(via, gaussian.transport(x, *a, *c), rtol=1e-12, atol=1e-12)
    back = gaussian.transport(via, *c, *a)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)


def test_the_marginal_has_the_mean_and_the_covariance_of_its_level():
    """From every unit vector as noise the map's columns show: M M^T is the covariance."""
    gaussian, alpha, sigma = some_gaussian(), 0.8, 0.5
    zero = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    mean = gaussian.marginal(zero, alpha, sigma)
    torch.testing.assert_close(mean[0], alpha * gaussian.mean)
    units = torch.eye(D, dtype=torch.float64).reshape(D, 1, 2, 3)
    columns = (gaussian.marginal(units, alpha, sigma) - mean).flatten(1)
    expected = alpha**2 * covariance(gaussian) + sigma**2 * torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(columns.T @ columns, expected)


@pytest.mark.parametrize(("rank", "floor"), [(D, 0.0), (3, 0.3), (0, 0.7)])
def test_the_density_is_that_of_the_full_covariance_and_its_gradient_the_score(rank, floor):
    gaussian, alpha, sigma = some_gaussian(rank, floor), 0.8, 0.5
    x = torch.randn(5, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    density = gaussian.log_density(x, alpha, sigma)
    total = alpha**2 * covariance(gaussian) + sigma**2 * torch.eye(D, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(alpha * gaussian.mean.flatten(), total)
    torch.testing.assert_close(density, exact.log_prob(x.flatten(1)))
    (score,) = torch.autograd.grad(density.sum(), x)
    denoised = gaussian.denoise(x.detach(), alpha, sigma)
    torch.testing.assert_close(score, (alpha * denoised - x.detach()) / sigma**2)


def some_mixture(by_class=False):
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    return GaussianMixture([some_gaussian(seed=k) for k in range(3)], weights, by_class)


def test_the_mixtures_denoiser_is_the_score_of_its_density():
    mixture, alpha, sigma = some_mixture(), 0.8, 0.9
    x = torch.randn(5, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    densities = torch.stack([mixture[k].log_density(x, alpha, sigma) for k in range(3)])
    density = (densities + mixture.log_weights[:, None]).logsumexp(0)
    (score,) = torch.autograd.grad(density.sum(), x)
    denoised = mixture.denoise(x.detach(), alpha, sigma)
    torch.testing.assert_close(score, (alpha * denoised - x.detach()) / sigma**2)


def test_two_points_denoise_as_tanh():
    """Points at +-1: D(x) = tanh(x / sigma^2), 0.91582 at x = 1, sigma = 0.8 (METHODS 6 d)."""
    empty, none = torch.zeros(1, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    ends = [Gaussian(torch.tensor([m], dtype=torch.float64), empty, none) for m in (-1.0, 1.0)]
    x = torch.tensor([[1.0], [-0.3]], dtype=torch.float64)
    found = GaussianMixture(ends, half).denoise(x, 1.0, 0.8)
    torch.testing.assert_close(found, (x / 0.64).tanh(), rtol=1e-12, atol=1e-12)
    assert float(found[0]) == pytest.approx(0.91582, abs=5e-6)


def test_a_class_is_denoised_by_its_component_and_the_null_class_by_all():
    mixture = some_mixture(by_class=True)
    x = torch.randn(3, 1, 2, 3, dtype=torch.float64)
    found = mixture.denoise(x, 0.8, 0.9, torch.tensor([2, 0, 3]))
    torch.testing.assert_close(found[:1], mixture[2].denoise(x[:1], 0.8, 0.9))
    torch.testing.assert_close(found[1:2], mixture[0].denoise(x[1:2], 0.8, 0.9))
    torch.testing.assert_close(found[2:], mixture.denoise(x[2:], 0.8, 0.9))


def test_samples_of_classes_travel_by_their_own_gaussian_in_every_copy():
    mixture = some_mixture(by_class=True)
    x = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    given = mixture.given(torch.tensor([2, 0]))
    found = given.transport(torch.cat((x, x)), 1.0, 5.0, 1.0, 0.5)
    for copy in (found[:2], found[2:]):
        torch.testing.assert_close(copy[:1], mixture[2].transport(x[:1], 1.0, 5.0, 1.0, 0.5))
        torch.testing.assert_close(copy[1:], mixture[0].transport(x[1:], 1.0, 5.0, 1.0, 0.5))
    with pytest.raises(ValueError, match="3 samples were given, but 2 labels"):
        given.transport(x[[0, 0, 1]], 1.0, 5.0, 1.0, 0.5)
    with pytest.raises(ValueError, match="expected some of the 3 classes"):
        mixture.given(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="clusters, not classes"):
        some_mixture().given(torch.tensor([0]))


def test_statistics_of_pixels_convert_by_rule():
    """[0, 1] to [-1, 1]: mu to 2 mu - 1, lambda to 4 lambda, the floor too."""
    gaussian = some_gaussian()
    converted = gaussian.rescaled(2.0, -1.0)
    torch.testing.assert_close(converted.mean, 2 * gaussian.mean - 1)
    torch.testing.assert_close(covariance(converted), 4 * covariance(gaussian))


def test_truncation_keeps_the_total_variance():
    gaussian = some_gaussian()
    short = gaussian.truncated(1)
    assert short.rank == 1
    torch.testing.assert_close(covariance(short).trace(), covariance(gaussian).trace())
    with pytest.raises(ValueError, match="expected 0 to 3"):
        gaussian.truncated(4)


@pytest.mark.parametrize("mixture", [False, True])
def test_a_file_gives_back_what_was_saved(mixture, tmp_path):
    saved = some_mixture(by_class=True) if mixture else some_gaussian()
    one = saved[0] if mixture else saved
    one.fit = Fit(7, "digits", process={"name": "edm"}, total_variance=2.0, left_out=(1.0, 0.25))
    save_gaussian(tmp_path / "g.safetensors", saved)
    loaded = load_gaussian(tmp_path / "g.safetensors", dtype=torch.float64)
    assert type(loaded) is type(saved)
    found = loaded[0] if mixture else loaded
    assert found.fit == one.fit
    assert found.floor == one.floor
    x, labels = torch.randn(4, 1, 2, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    assert torch.equal(loaded.denoise(x, 0.7, 0.4, labels), saved.denoise(x, 0.7, 0.4, labels))


def test_files_that_hold_no_gaussian_are_refused_by_name(tmp_path):
    path = tmp_path / "g.safetensors"
    with pytest.raises(ValueError, match="is no file"):
        load_gaussian(path)
    save_gaussian(path, some_gaussian())
    tensors = load_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-16])
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_gaussian(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="has format None"):
        load_gaussian(path)

    def altered(**changes):
        text = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
        metadata = json.loads(text)["__metadata__"]
        save_file({**tensors, **changes}, path, metadata)

    for changes, match in (
        ({"0.mean": tensors["0.mean"] * torch.nan}, "mean holds values that are not finite"),
        ({"0.basis": tensors["0.basis"] * 1.1}, "not orthonormal"),
        ({"0.variances": -tensors["0.variances"]}, "not negative"),
        ({"0.variances": tensors["0.variances"][:2]}, "do not fit"),
        ({"other": torch.zeros(2)}, "unknown tensors"),
    ):
        altered(**changes)
        with pytest.raises(ValueError, match=match):
            load_gaussian(path)


def test_samples_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \[6\], but the Gaussian is of \[1, 2, 3\]"):
        some_gaussian().denoise(torch.randn(2, 6), 1.0, 1.0)
    with pytest.raises(ValueError, match="leaves none of 2 steps"):
        some_gaussian().teleport(2)(torch.zeros(1, 1, 2, 3), [2.0, 1.0, 0.0])
