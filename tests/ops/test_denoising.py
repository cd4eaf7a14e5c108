"""`denoising_cotangent` against autograd of the plain loss in every space, and `renoise`."""

from __future__ import annotations

import pytest
import torch

from fastdistill.diffusion import (
    X0,
    EDMPreconditioning,
    Epsilon,
    Flow,
    Noise,
    V,
    convert,
    loss_weight,
)
from fastdistill.functional import denoising_loss
from fastdistill.ops import Coefficients, denoising_cotangent, renoise, use_backend

BACKENDS = ["reference", "cpu", "triton"]
SPACES = [Epsilon(), V(), X0(), Flow(), EDMPreconditioning()]


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x0, noise, raw = (torch.randn(3, 2, 4, 8, generator=generator, dtype=dtype) for _ in range(3))
    sigma = torch.tensor([0.2, 0.6, 0.9], dtype=dtype)
    alpha = torch.tensor([1.0, 0.8, 0.3], dtype=dtype)
    wide = (-1, 1, 1, 1)
    return x0, alpha.view(wide) * x0 + sigma.view(wide) * noise, raw, alpha, sigma


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_loss_in_a_space_is_the_squared_error_there(space, backend):
    """An epsilon network's loss in any space is the MSE of the converted prediction."""
    x0, x_t, raw, alpha, sigma = case()
    own = Epsilon()
    raw_live = raw.clone().requires_grad_()
    predicted = convert(raw_live, own, space, x_t, alpha, sigma)
    target = convert(x0, X0(), space, x_t, alpha, sigma)
    expected = (predicted - target).square().mean()
    (gradient,) = torch.autograd.grad(expected, raw_live)
    weight = loss_weight(space, alpha, sigma)
    with use_backend(backend):
        result = denoising_cotangent(
            raw.float(),
            x0.float(),
            x_t.float(),
            own.coefficients(alpha, sigma),
            weight,
            scale=1 / len(x0),
        )
    torch.testing.assert_close(result.cotangent.double(), gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.loss.double().mean(), expected.detach(), rtol=1e-5, atol=0)


def test_functional_loss_is_the_networks_own_mse():
    x0, x_t, raw, alpha, sigma = case(torch.float32)
    raw = raw.requires_grad_()
    noise = convert(x0, X0(), Epsilon(), x_t, alpha, sigma)
    expected = torch.nn.functional.mse_loss(raw, noise)
    (gradient,) = torch.autograd.grad(expected, raw)
    loss = denoising_loss(raw, x0, x_t, alpha, sigma, prediction_type="epsilon")
    (found,) = torch.autograd.grad(loss, raw)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6)


def test_unknown_prediction_type_and_reduction_are_refused():
    x0, x_t, raw, alpha, sigma = case(torch.float32)
    with pytest.raises(ValueError, match="expected one of epsilon"):
        denoising_loss(raw, x0, x_t, alpha, sigma, prediction_type="eps")
    with pytest.raises(ValueError, match="'mean' or 'none'"):
        denoising_loss(raw, x0, x_t, alpha, sigma, reduction="sum")


@pytest.mark.parametrize("backend", BACKENDS)
def test_renoise_is_the_forward_process_and_the_networks_input(backend):
    x0, _, _, alpha, sigma = case(torch.float32)
    index, noise = torch.tensor([4, 0, 9]), Noise(7).at(3)
    scale = torch.tensor([0.5, 1.0, 2.0])
    wide = (-1, 1, 1, 1)
    with use_backend(backend):
        result = renoise(x0, alpha, sigma, noise.key("n"), index, scale, torch.float16)
        eps = noise.normal("n", index, x0.shape[1:])
        alone = renoise(x0, alpha, sigma, noise.key("n"), index)
    expected = alpha.view(wide) * x0 + sigma.view(wide) * eps
    torch.testing.assert_close(result.x_t, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        result.model_input, (scale.view(wide) * expected).half(), rtol=2e-3, atol=1e-5
    )
    assert torch.equal(alone.x_t, result.x_t)
    assert alone.model_input is alone.x_t


@pytest.mark.parametrize("backend", BACKENDS)
def test_renoise_passes_gradients_to_the_sample(backend):
    x0, _, _, alpha, sigma = case(torch.float32)
    x0 = x0.requires_grad_()
    scale = torch.tensor([0.5, 1.0, 2.0])
    with use_backend(backend):
        result = renoise(x0, alpha, sigma, Noise(7).key("n"), torch.arange(3), scale)
        (result.x_t.sum() + 3 * result.model_input.sum()).backward()
    expected = (alpha * (1 + 3 * scale)).view(-1, 1, 1, 1).expand_as(x0)
    torch.testing.assert_close(x0.grad, expected)


def test_shapes_that_do_not_fit_are_refused():
    x0, x_t, raw, alpha, sigma = case(torch.float32)
    with pytest.raises(ValueError, match="x_t has shape"):
        denoising_cotangent(raw, x0, x_t[:, :1], Coefficients(alpha, sigma))
    with pytest.raises(ValueError, match="alpha has shape"):
        renoise(x0, alpha[:2], sigma, Noise(7).key("n"), torch.arange(3))


def test_a_batch_of_none_is_no_error_on_any_backend():
    empty, none = torch.zeros(0, 2, 4), torch.zeros(0)
    for backend in BACKENDS:
        with use_backend(backend):
            result = denoising_cotangent(empty, empty, empty, Coefficients(none, none))
            assert result.cotangent.shape == (0, 2, 4)
            assert result.loss.shape == (0,)


def test_a_scale_that_is_not_positive_is_refused():
    x0, x_t, raw, alpha, sigma = case(torch.float32)
    with pytest.raises(ValueError, match="scale is 0"):
        denoising_cotangent(raw, x0, x_t, Coefficients(alpha, sigma), scale=0)
