"""`matching_cotangent` against the losses that it stands for, and what makes it better."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdistill.diffusion import EDMPreconditioning, Epsilon, V
from fastdistill.functional import distribution_matching_loss
from fastdistill.ops import matching_cotangent, use_backend

BACKENDS = ["reference", "cpu", "triton"]


def case(shape=(3, 2, 4, 8), dtype=torch.float32, gap=0.3):
    """Samples, noisy samples, raw outputs of epsilon networks, and (alpha, sigma)."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    sigma = torch.linspace(0.3, 0.9, shape[0], dtype=torch.float64)
    alpha = (1 - sigma**2).sqrt()
    x, noise, teacher = draw[0], draw[1], draw[2]
    wide = (-1, *[1] * (len(shape) - 1))
    x_t = alpha.view(wide) * x + sigma.view(wide) * noise
    values = (x, x_t, teacher, teacher + gap * draw[3], draw[4])
    return [value.to(dtype) for value in values], alpha, sigma


def dmd_loss_by_autograd(x, x_t, teacher, critic, uncond, alpha, sigma, guidance_scale, weight):
    """DMD2's own formulation: denoisers, normaliser, and an MSE against a pseudo-target."""
    wide = (-1, *[1] * (x.ndim - 1))
    alpha, sigma = alpha.view(wide), sigma.view(wide)
    guided = uncond + guidance_scale * (teacher - uncond)
    real, fake = ((x_t - sigma * eps) / alpha for eps in (guided, critic))
    with torch.no_grad():
        normaliser = (x - real).abs().flatten(1).mean(1).view(wide) + 1e-6
        g = weight.view(wide) * (fake - real) / normaliser
    x = x.clone().requires_grad_()
    loss = 0.5 * F.mse_loss(x, (x - g).detach())
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dmds_pseudo_target_loss_with_guidance(backend):
    (x, x_t, teacher, critic, uncond), alpha, sigma = case()
    weight = torch.tensor([0.5, 1.0, 2.0])
    loss, gradient = dmd_loss_by_autograd(
        *(value.double() for value in (x, x_t, teacher, critic, uncond)), alpha, sigma, 3.5, weight
    )
    coefficients = Epsilon().coefficients(alpha, sigma)
    with use_backend(backend):
        result = matching_cotangent(
            x,
            x_t,
            teacher,
            coefficients,
            critic,
            coefficients,
            teacher_uncond=uncond,
            guidance_scale=3.5,
            weight=weight,
            scale=1 / len(x),
        )
    torch.testing.assert_close(result.cotangent.double(), gradient, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(result.loss.double().mean(), loss, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_and_critic_may_differ_in_parametrisation(backend):
    """The same two denoisers, told as epsilon and v, give the same gradient."""
    (x, x_t, teacher, critic, _), alpha, sigma = case(dtype=torch.float64)
    wide = (-1, 1, 1, 1)
    as_v = (critic - sigma.view(wide) * x_t) / alpha.view(wide)
    epsilon, v = Epsilon().coefficients(alpha, sigma), V().coefficients(alpha, sigma)
    with use_backend("reference"):
        expected = matching_cotangent(x, x_t, teacher, epsilon, critic, epsilon)
    with use_backend(backend):
        found = matching_cotangent(
            x.float(), x_t.float(), teacher.float(), epsilon, as_v.float(), v
        )
    torch.testing.assert_close(found.cotangent, expected.cotangent.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropic_weight_mixes_the_unconditional_critic(backend):
    """arXiv 2401.00909: the gap is lambda D_psi(none) + (1 - lambda) D_psi(c) - D_phi(c)."""
    (x, x_t, teacher, critic, uncond), alpha, sigma = case()
    coefficients = Epsilon().coefficients(alpha, sigma)
    mixed = 0.25 * uncond + 0.75 * critic
    with use_backend(backend):
        expected = matching_cotangent(x, x_t, teacher, coefficients, mixed, coefficients)
        found = matching_cotangent(
            x,
            x_t,
            teacher,
            coefficients,
            critic,
            coefficients,
            critic_uncond=uncond,
            esd_lambda=0.25,
        )
    torch.testing.assert_close(found.cotangent, expected.cotangent, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("written", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-3)])
def test_small_gaps_survive_bfloat16(backend, written, bound):
    """A critic within 0.01 of the teacher, inputs in bfloat16: 0.01 % off, or bfloat16's rounding.

    DMD's pseudo-target in bfloat16 loses 2.8 % here.
    """
    (x, x_t, teacher, critic, _), alpha, sigma = case((4, 4, 16, 16), torch.bfloat16, gap=0.01)
    parametrisation = EDMPreconditioning()
    coefficients = parametrisation.coefficients(alpha, sigma)
    with use_backend("reference"):
        inputs = [value.double() for value in (x, x_t, teacher, critic)]
        exact = matching_cotangent(
            inputs[0], inputs[1], inputs[2], coefficients, inputs[3], coefficients
        ).cotangent
    with use_backend(backend):
        found = matching_cotangent(
            x, x_t, teacher, coefficients, critic, coefficients, dtype=written
        ).cotangent
    error = (found.double() - exact).norm() / exact.norm()
    if backend == "triton" and written == torch.bfloat16:
        bound = 2**-8  # the interpreter truncates where hardware rounds
    assert found.dtype == written
    assert error < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_does_not_depend_on_the_scale_of_sample_and_teacher_distance(backend):
    """DMD's normaliser: g does not change when the gap and x - D_phi are multiplied alike."""
    (x, x_t, teacher, critic, _), alpha, sigma = case()
    one, half = (Epsilon().coefficients(alpha, value * sigma) for value in (1.0, 1.0))
    with use_backend(backend):
        g = matching_cotangent(x, x_t, teacher, one, critic, half).cotangent
        tripled = matching_cotangent(3 * x, 3 * x_t, 3 * teacher, one, 3 * critic, half).cotangent
    torch.testing.assert_close(tripled, g, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_that_are_not_finite_become_zero_and_are_counted(backend):
    (x, x_t, teacher, critic, _), alpha, sigma = case()
    critic[0, 0, 0, 0] = float("nan")
    critic[1, 0, 0, :2] = float("inf")
    teacher[2, 0, 0, 0] = float("nan")  # poisons the sample's normaliser
    coefficients = Epsilon().coefficients(alpha, sigma)
    with use_backend(backend):
        result = matching_cotangent(x, x_t, teacher, coefficients, critic, coefficients)
    assert result.nonfinite.tolist() == [1, 2, x[0].numel()]
    assert torch.isfinite(result.cotangent).all()
    assert torch.isfinite(result.loss).all()
    assert result.cotangent[2].abs().max() == 0
    assert result.cotangent[0].abs().max() > 0


def test_functional_loss_is_an_ordinary_differentiable_loss():
    (x, x_t, teacher, critic, uncond), alpha, sigma = case()
    weight = torch.ones(3)
    expected, gradient = dmd_loss_by_autograd(
        x, x_t, teacher, critic, uncond, alpha.float(), sigma.float(), 2.0, weight
    )
    x = x.clone().requires_grad_()
    loss = distribution_matching_loss(
        x, x_t, teacher, critic, alpha, sigma, teacher_output_uncond=uncond, guidance_scale=2.0
    )
    (3 * loss).backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(x.grad, 3 * gradient, rtol=1e-4, atol=1e-8)


def test_scale_multiplies_the_cotangent_and_not_the_loss():
    (x, x_t, teacher, critic, _), alpha, sigma = case()
    coefficients = Epsilon().coefficients(alpha, sigma)
    x = x.requires_grad_()
    gradients, cotangents, losses = [], [], []
    for scale in (1.0, 0.25):
        result = matching_cotangent(
            x, x_t, teacher, coefficients, critic, coefficients, scale=scale
        )
        gradients.append(torch.autograd.grad(result.loss.sum(), x)[0])
        cotangents.append(result.cotangent)
        losses.append(result.loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(cotangents[1], 0.25 * cotangents[0])
    torch.testing.assert_close(gradients[0], cotangents[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": 2.0}, "needs teacher_uncond"),
        ({"esd_lambda": 0.5}, "needs critic_uncond"),
        ({"weight": torch.ones(5)}, "one number a sample"),
        ({"teacher_uncond": torch.zeros(3, 2, 4, 7)}, r"expected \(3, 2, 4, 8\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    (x, x_t, teacher, critic, _), alpha, sigma = case()
    coefficients = Epsilon().coefficients(alpha, sigma)
    with pytest.raises(ValueError, match=message):
        matching_cotangent(x, x_t, teacher, coefficients, critic, coefficients, **change)


def test_integers_are_refused():
    (x, x_t, teacher, critic, _), alpha, sigma = case()
    coefficients = Epsilon().coefficients(alpha, sigma)
    with pytest.raises(ValueError, match=r"x0 is torch\.int64"):
        matching_cotangent(x.long(), x_t, teacher, coefficients, critic, coefficients)
