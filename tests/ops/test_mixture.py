"""`mixture_denoise` against torch.distributions, autograd of the density, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastdistill.ops import gaussian_denoise, mixture_denoise, use_backend

BACKENDS = ["reference", "cpu", "triton"]


def case(batch=3, components=4, d=7, isotropic=False):
    """x, alpha, sigma, means, variances and log weights, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    means = 4 * draw(components, d) - 2
    variances = draw(components) if isotropic else draw(components, d)
    return (
        6 * draw(batch, d) - 3,
        *(draw(2, batch) + 0.2),
        means,
        variances,
        draw(components).log().log_softmax(0),
    )


def stored(backend, *tensors):
    """The tensors in float64 for the reference and in float32 for backends that compute in it."""
    return [value if backend == "reference" else value.float() for value in tensors]


def density(x, alpha, sigma, means, variances, log_weights):
    """log p_t(x) by torch.distributions."""
    spread = variances if variances.ndim == 2 else variances[:, None].expand_as(means)
    a, s = alpha[:, None, None], sigma[:, None, None]
    components = Independent(Normal(a * means, (a**2 * spread + s**2).sqrt()), 1)
    weights = Categorical(logits=log_weights.expand(len(x), -1))
    return MixtureSameFamily(weights, components).log_prob(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("isotropic", [False, True])
def test_density_and_denoiser_belong_together(isotropic, backend):
    """log p is torch's, and D = (x + sigma^2 grad log p) / alpha, Tweedie's formula."""
    x, alpha, sigma, *mixture = case(isotropic=isotropic)
    x.requires_grad_()
    expected = density(x, alpha, sigma, *mixture)
    (score,) = torch.autograd.grad(expected.sum(), x)
    dtype = torch.float64 if backend == "reference" else torch.float32
    with use_backend(backend):
        result = mixture_denoise(*stored(backend, x.detach(), alpha, sigma, *mixture))
    tight = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(result.log_density.double(), expected.detach(), **tight)
    denoised = (x + sigma[:, None] ** 2 * score) / alpha[:, None]
    torch.testing.assert_close(result.denoised.double(), denoised.detach(), **tight)
    torch.testing.assert_close(result.posterior.sum(1).double(), torch.ones(3).double())


@pytest.mark.parametrize("isotropic", [False, True])
def test_gradients_pass_through_denoiser_and_density(isotropic, reference_backend):
    x, *rest = case(isotropic=isotropic)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mixture_denoise(x, *rest)[:2], (x,))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("isotropic", [False, True])
def test_gradients_of_every_backend(isotropic, backend):
    x, *rest = case(isotropic=isotropic)

    def gradient(x, *rest):
        x = x.requires_grad_()
        result = mixture_denoise(x, *rest)
        value = (result.denoised.square().sum(1) + 0.5 * result.log_density).sum()
        return torch.autograd.grad(value, x)[0]

    with use_backend("reference"):
        expected = gradient(x.clone(), *rest)
    with use_backend(backend):
        found = gradient(*stored(backend, x, *rest))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_points_denoise_to_a_hyperbolic_tangent(backend):
    """Points at -1 and 1, EDM: D = tanh(x / sigma^2); at x = 1, sigma = 0.8 it is 0.91582."""
    x = torch.tensor([[1.0], [0.0], [-3.0]])
    one = torch.ones(3)
    means, variances = torch.tensor([[-1.0], [1.0]]), torch.zeros(2)
    with use_backend(backend):
        result = mixture_denoise(x, one, 0.8 * one, means, variances)
    torch.testing.assert_close(result.denoised, torch.tanh(x / 0.64), rtol=1e-5, atol=1e-6)
    assert float(result.denoised[0]) == pytest.approx(0.91582, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_component_is_the_gaussian_denoiser(backend):
    x, alpha, sigma, means, variances, _ = case(components=1)
    with use_backend(backend):
        args = stored("any", x, alpha, sigma, means, variances)
        mixture = mixture_denoise(*args).denoised
    with use_backend("reference"):
        basis = torch.eye(x.shape[1], dtype=x.dtype)
        gaussian = gaussian_denoise(x, means[0], basis, variances[0], alpha, sigma)
    torch.testing.assert_close(mixture.double(), gaussian, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_components_do_not_overflow(backend):
    """Squared distances over variances of 1e9: the log-sum-exp must hold them."""
    x = torch.tensor([[100.0, -100.0]])
    one = torch.ones(1)
    means = torch.tensor([[0.0, 0.0], [99.0, -99.0]])
    with use_backend(backend):
        result = mixture_denoise(x, one, 0.003 * one, means, torch.zeros(2))
    assert result.log_density.isfinite().all()
    torch.testing.assert_close(result.denoised, means[1:])
    assert result.posterior.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_samples_lose_only_their_rounding(dtype, backend):
    x, *rest = case(batch=4, components=3, d=50)
    x, rest = x.to(dtype), stored("any", *rest)
    with use_backend("reference"):
        exact = mixture_denoise(x.double(), *(value.double() for value in rest))
    with use_backend(backend):
        found = mixture_denoise(x, *rest)
    assert found.denoised.dtype == dtype
    place = torch.finfo(dtype).eps * (2 if backend == "triton" else 1)  # the interpreter truncates
    torch.testing.assert_close(found.denoised.double(), exact.denoised, rtol=place, atol=1e-4)
    torch.testing.assert_close(found.log_density.double(), exact.log_density, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_and_an_empty_batch(backend):
    x, alpha, sigma, means, variances, weights = stored("any", *case(d=12))
    image, centres = x.view(3, 3, 2, 2), means.view(4, 3, 2, 2)
    spread = variances.view(4, 3, 2, 2)
    with use_backend(backend):
        found = mixture_denoise(image, alpha, sigma, centres, spread, weights)
        flat = mixture_denoise(x, alpha, sigma, means, variances, weights)
        none = mixture_denoise(image[:0], alpha[:0], sigma[:0], centres, spread)
    assert torch.equal(found.denoised.flatten(1), flat.denoised)
    assert none.denoised.shape == (0, 3, 2, 2)
    assert none.posterior.shape == (0, 4)


def test_uniform_weights_are_the_default(reference_backend):
    *args, _ = case()
    uniform = torch.full((4,), -math.log(4), dtype=torch.float64)
    torch.testing.assert_close(
        mixture_denoise(*args).log_density, mixture_denoise(*args, uniform).log_density
    )


def test_wrong_input_is_refused():
    x, alpha, sigma, means, variances, weights = case()
    with pytest.raises(ValueError, match="means have shape"):
        mixture_denoise(x, alpha, sigma, means[:, :3], variances, weights)
    with pytest.raises(ValueError, match="variances have shape"):
        mixture_denoise(x, alpha, sigma, means, variances[:2], weights)
    with pytest.raises(ValueError, match="log_weights have shape"):
        mixture_denoise(x, alpha, sigma, means, variances, weights[:2])
