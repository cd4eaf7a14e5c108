"""Exact diffusion of mixtures against torch.distributions, closed forms and another solver."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from fastdistill.diffusion import EDM, VP, GaussianMixture, Noise, RectifiedFlow, integrate

PROCESSES = {
    "edm": (EDM(), 4.0, 0.3),
    "vp": (VP.dit(), 800.0, 100.0),
    "flow": (RectifiedFlow(), 0.8, 0.25),
}


@pytest.fixture(autouse=True)
def _random_configuration():
    """Another configuration in every run, as no number of these tests is tuned to one."""
    with torch.random.fork_rng():
        torch.seed()
        yield


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def random_mixture(components: int, d: int) -> GaussianMixture:
    """Means and covariances of random scale."""
    factors = draw(components, d, d)
    covariances = 0.3 * factors @ factors.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    covariances[-1] = covariances[-1].diagonal().diag()  # one along the coordinates, the last
    weights = 0.5 + torch.rand(components, dtype=torch.float64)
    return GaussianMixture(2 * draw(components, d), covariances, weights, torch.float64)


def reference(mixture: GaussianMixture, alpha: float, sigma: float) -> MixtureSameFamily:
    """p_t by torch.distributions."""
    eye = torch.eye(mixture.dimensions, dtype=torch.float64)
    spread = alpha**2 * mixture.covariances + sigma**2 * eye
    return MixtureSameFamily(
        Categorical(logits=mixture.log_weights),
        MultivariateNormal(alpha * mixture.means, spread),
    )


def levels(process, *times: float, count: int = 6) -> list[Tensor]:
    """alpha and sigma at each of the times, [count] each."""
    found: list[Tensor] = []
    for time in times:
        found += process.alpha_sigma(torch.full((count,), time, dtype=torch.float64))
    return found


@pytest.mark.parametrize("name", PROCESSES)
def test_density_score_and_denoiser_are_those_of_the_noised_components(name):
    """T9, at a random configuration: log p, grad log p by autograd, and Tweedie's D."""
    process, time, _ = PROCESSES[name]
    mixture = random_mixture(4, 5)
    assert mixture.order.tolist() != [0, 1, 2, 3]
    alpha, sigma = levels(process, time)
    expected = reference(mixture, float(alpha[0]), float(sigma[0]))
    x = 2 * draw(6, 5)
    x.requires_grad_()
    log_density = expected.log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    found = mixture.denoise(x, alpha, sigma)
    torch.testing.assert_close(found.log_density, log_density.detach())
    torch.testing.assert_close(mixture.score(x, alpha, sigma), score)
    tweedie = (x + sigma[:, None] ** 2 * score) / alpha[:, None]
    torch.testing.assert_close(found.denoised, tweedie)
    components = expected.component_distribution.log_prob(x[:, None]) + mixture.log_weights
    torch.testing.assert_close(found.posterior, components.softmax(1))


def test_the_denoiser_has_a_gradient():
    mixture = random_mixture(3, 2)
    alpha, sigma = levels(EDM(), 0.7, count=2)
    x = draw(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mixture.denoise(x, alpha, sigma)[:2], (x,))


def test_the_clean_density_is_known_too():
    mixture = random_mixture(3, 2)
    one, zero = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    x = draw(6, 2)
    expected = reference(mixture, 1.0, 0.0).log_prob(x)
    torch.testing.assert_close(mixture.log_density(x, one, zero), expected)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_gaussian_is_transported_in_closed_form(name):
    """T8: mean and every scale; x' = alpha' mu + U sqrt(v' / v) U^T (x - alpha mu), and as the ODE.

    The general solver, told that there are two equal components, must agree.
    """
    process, time, to = PROCESSES[name]
    one = random_mixture(1, 4)
    factor = draw(4, 4)
    covariance = factor @ factor.T + 0.1 * torch.eye(4, dtype=torch.float64)
    one = GaussianMixture(one.means, covariance[None], dtype=torch.float64)
    alpha, sigma, to_alpha, to_sigma = levels(process, time, to)
    x = draw(6, 4) + 1.0
    moved = one.transport(x, alpha, sigma, to_alpha, to_sigma)
    values, axes = torch.linalg.eigh(covariance)
    gain = (
        (to_alpha[0] ** 2 * values + to_sigma[0] ** 2) / (alpha[0] ** 2 * values + sigma[0] ** 2)
    ).sqrt()
    expected = to_alpha[0] * one.means + ((x - alpha[0] * one.means) @ axes * gain) @ axes.T
    torch.testing.assert_close(moved, expected)
    twice = GaussianMixture(
        one.means.repeat(2, 1), covariance.repeat(2, 1, 1), torch.tensor([0.3, 0.7]), torch.float64
    )
    solved = twice.transport(x, alpha, sigma, to_alpha, to_sigma, tolerance=1e-8)
    torch.testing.assert_close(solved, expected, rtol=1e-6, atol=1e-6)


def test_the_published_transport_of_one_number():
    """METHODS 6: mu 0.5, variance 0.25, EDM from 80 at x = 40 to 10."""
    mixture = GaussianMixture(torch.tensor([[0.5]]), torch.tensor([[0.25]]), dtype=torch.float64)
    alpha, sigma, to_alpha, to_sigma = levels(EDM(), 80.0, 10.0, count=1)
    x = torch.tensor([[40.0]], dtype=torch.float64)
    moved = mixture.transport(x, alpha, sigma, to_alpha, to_sigma)
    assert float(moved) == pytest.approx(5.4435714692, abs=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_mixture_is_transported_as_its_probability_flow_says(name):
    """Against classical Runge-Kutta in the process' own lambda = sigma / alpha, and back again."""
    process, time, to = PROCESSES[name]
    mixture = random_mixture(3, 2)
    alpha, sigma, to_alpha, to_sigma = levels(process, time, to)
    x = alpha[:, None] * mixture.means.repeat(2, 1) + sigma[:, None] * draw(6, 2)
    moved = mixture.transport(x, alpha, sigma, to_alpha, to_sigma, tolerance=1e-8)
    y, ratio, end = x / alpha[:, None], sigma / alpha, to_sigma / to_alpha
    step = (end / ratio) ** (1 / 400)
    for k in range(400):
        y = _runge_kutta(mixture, y, ratio * step**k, ratio * step ** (k + 1))
    torch.testing.assert_close(moved, to_alpha[:, None] * y, rtol=1e-5, atol=1e-6)
    back = mixture.transport(moved, to_alpha, to_sigma, alpha, sigma, tolerance=1e-8)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def _runge_kutta(mixture: GaussianMixture, y: Tensor, start: Tensor, end: Tensor) -> Tensor:
    def slope(y: Tensor, ratio: Tensor) -> Tensor:
        denoised = mixture.denoise(y, torch.ones_like(ratio), ratio).denoised
        return (y - denoised) / ratio[:, None]

    h, middle = (end - start)[:, None], (start + end) / 2
    k1 = slope(y, start)
    k2 = slope(y + h / 2 * k1, middle)
    k3 = slope(y + h / 2 * k2, middle)
    k4 = slope(y + h * k3, end)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def test_pure_noise_of_a_flow_is_carried_to_the_data():
    """alpha = 0 at the start and sigma = 0 at the end: neither is a singular point."""
    mixture = GaussianMixture(torch.tensor([[-2.0], [2.0]]), torch.tensor([[0.01], [0.01]]))
    noise = Noise(3, "cpu")
    z = noise.normal("z", torch.arange(400), (1,))
    alpha, sigma = torch.zeros(400), torch.ones(400)
    samples = mixture.transport(z, alpha, sigma, sigma, alpha)
    near = samples.abs()
    assert float((near - 2).mean()) == pytest.approx(0.0, abs=0.02)
    assert float((near - 2).std()) == pytest.approx(0.1, rel=0.1)
    assert (samples.sign() == z.sign()).all(), "trajectories in one dimension do not cross"


def test_samples_have_the_moments_and_weights_of_the_mixture():
    mixture = random_mixture(3, 2).float()
    index = torch.arange(40_000)
    samples, components = mixture.sample(Noise(5, "cpu"), index)
    for k in range(3):
        own = samples[components == k]
        share = len(own) / len(index)
        assert share == pytest.approx(float(mixture.log_weights[k].exp()), abs=0.01)
        spread = float(mixture.covariances[k].diagonal().max().sqrt())
        assert (own.mean(0) - mixture.means[k]).abs().max() < 5 * spread / math.sqrt(len(own))
        torch.testing.assert_close(own.T.cov(), mixture.covariances[k], rtol=0.1, atol=0.05)


def test_samples_are_a_function_of_seed_step_and_index():
    mixture = random_mixture(3, 2).float()
    whole = mixture.sample(Noise(5, "cpu").at(2), torch.arange(10)).samples
    part = mixture.sample(Noise(5, "cpu").at(2), torch.arange(4, 7)).samples
    assert torch.equal(whole[4:7], part)
    assert not torch.equal(mixture.sample(Noise(5, "cpu").at(3), torch.arange(10)).samples, whole)


@pytest.mark.parametrize(
    ("means", "covariances", "weights", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2, 2), None, "do not belong together"),
        (torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), None, "eigenvalue -1"),
        (torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]), None, "not symmetric"),
        (torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([1.0, 0.0]), "2 positive ones"),
    ],
)
def test_what_is_no_mixture_is_refused(means, covariances, weights, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(means, covariances, weights)


def test_samples_of_another_width_are_refused():
    mixture = random_mixture(2, 3)
    with pytest.raises(ValueError, match=r"expected \[B, 3\]"):
        mixture.denoise(draw(4, 2), *levels(EDM(), 1.0, count=4))


def test_the_solver_is_as_accurate_as_it_is_told_to_be():
    """dx/ds = -lambda x + cos s, with a closed form; errors fall with the tolerance."""
    rate = torch.tensor([[1.0], [5.0]], dtype=torch.float64)

    def velocity(x: Tensor, s: float) -> Tensor:
        return -rate * x + math.cos(s)

    start = torch.ones(2, 1, dtype=torch.float64)
    fixed = rate / (1 + rate**2)
    exact = fixed * math.cos(1) + math.sin(1) / (1 + rate**2) + (start - fixed) * (-rate).exp()
    errors = [
        float((integrate(velocity, start, tolerance) - exact).abs().max())
        for tolerance in (1e-4, 1e-7, 1e-10)
    ]
    assert errors[0] < 1e-3
    assert errors[1] < 1e-6
    assert errors[2] < 1e-9
    assert errors[2] < errors[1] < errors[0]


def test_the_solver_says_why_it_gives_up():
    start = torch.ones(1, 1)
    with pytest.raises(ValueError, match="not finite after s = 0"):
        integrate(lambda x, s: x * float("nan"), start)
    with pytest.raises(ValueError, match="choose a larger tolerance"):
        integrate(lambda x, s: x, start, most_steps=1)
