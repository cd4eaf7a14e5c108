"""The pathwise gradient of every f-divergence against closed forms, for a mean and a scale.

A student x = m + s z against a teacher N(0, v), one noise level. Expectations over (z, eps) are
taken by Gauss-Hermite quadrature, so that the only error is rounding; the gradient comes out of
`matching_cotangent` with exact teacher, critic and density ratio. A mean alone cannot see half of
the mistakes, so every case checks the scale parameter too.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from gaussians import Gaussians, random_configurations
from torch import Tensor

from fastdistill.diffusion import X0
from fastdistill.objectives import get_divergence
from fastdistill.ops import matching_cotangent, use_backend

# By quadrature: teacher N(0, 1), m = 0.8, s = 0.6, EDM sigma = 0.5: dD/dm, dD/ds.
PUBLISHED = {
    "reverse_kl": (0.640000, -0.503607),
    "softened_reverse_kl": (0.303873, -0.188888),
    "jensen_shannon": (0.336127, -0.314718),
    "squared_hellinger": (0.191208, -0.199803),
    "forward_kl": (1.311475, -2.063961),
    "jeffreys": (1.951475, -2.567568),
    "alpha:-1": (0.691361, -0.368438),
}


def gradient(
    case: Gaussians, divergence: str, dtype: torch.dtype, order: int = 80
) -> tuple[float, float]:
    """(dD/dm, dD/ds) by `matching_cotangent` on the backend in force, in storage ``dtype``."""
    z, eps, quadrature = case.nodes(order)
    x = case.mean + case.scale * z
    x_t = case.alpha * x + case.sigma * eps
    teacher, critic = case.denoisers(x_t)
    ratio = case.log_ratio(x_t).exp()
    h = get_divergence(divergence).h(ratio) * (case.alpha / case.sigma) ** 2
    ones = torch.ones_like(x)
    compute = torch.promote_types(dtype, torch.float32)
    tensors = [value.to(dtype)[:, None] for value in (x, x_t, teacher, critic)]
    coefficients = X0().coefficients(ones.to(compute), ones.to(compute))
    result = matching_cotangent(
        tensors[0],
        tensors[1],
        tensors[2],
        coefficients,
        tensors[3],
        coefficients,
        weight=h.to(compute),
        normalise=False,
    )
    g = result.cotangent[:, 0].double()
    return float((quadrature * g).sum()), float((quadrature * g * z).sum())


def divergence_gradient(case: Gaussians, divergence: str) -> tuple[float, float]:
    """The same from the definition D = E_q[f(p / q)], by autograd through a dense grid."""
    mean = torch.tensor(case.mean, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(case.scale, dtype=torch.float64, requires_grad=True)
    width = 14 * max(case.variance_q, case.variance_p) ** 0.5
    x = torch.linspace(-width, width, 200_001, dtype=torch.float64)
    variance_q = case.alpha**2 * scale**2 + case.sigma**2

    def log_normal(mu: Tensor | float, variance: Tensor | float) -> Tensor:
        return -((x - mu) ** 2) / (2 * variance) - 0.5 * torch.log(
            2 * math.pi * torch.as_tensor(variance, dtype=torch.float64)
        )

    log_q = log_normal(case.alpha * mean, variance_q)
    ratio = (log_normal(0.0, case.variance_p) - log_q).exp()
    integrand = log_q.exp() * get_divergence(divergence).f(ratio)
    value = torch.trapezoid(torch.nan_to_num(integrand, 0.0, 0.0, 0.0), x)
    return tuple(float(g) for g in torch.autograd.grad(value, (mean, scale)))


@pytest.mark.parametrize("divergence", PUBLISHED)
def test_published_gradients_in_float64(divergence, reference_backend):
    found = gradient(Gaussians(), divergence, torch.float64)
    assert found == pytest.approx(PUBLISHED[divergence], abs=2e-6)


@pytest.mark.parametrize("gaussians", list(random_configurations()), ids=["edm", "vp", "flow"])
@pytest.mark.parametrize("divergence", PUBLISHED)
def test_gradient_equals_that_of_the_divergence_itself(divergence, gaussians, reference_backend):
    expected = divergence_gradient(gaussians, divergence)
    found = gradient(gaussians, divergence, torch.float64)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), gaussians


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", PUBLISHED)
def test_backends_are_as_exact_as_torch(divergence, dtype, backend):
    """Error against float64 at most twice that of plain torch in the same dtype."""
    order = 24
    with use_backend("reference"):
        exact = gradient(Gaussians(), divergence, torch.float64, order)
        plain = plain_torch_gradient(divergence, dtype, order)
    with use_backend(backend):
        found = gradient(Gaussians(), divergence, dtype, order)
    floor = torch.finfo(dtype).eps
    for mine, torchs, truth in zip(found, plain, exact, strict=True):
        assert abs(mine - truth) <= 2 * abs(torchs - truth) + floor * abs(truth)


def plain_torch_gradient(divergence, dtype, order) -> tuple[float, float]:
    """What a script without the op computes: the same formula in the storage dtype."""
    case = Gaussians()
    z, eps, quadrature = case.nodes(order)
    x_t = case.mean + case.scale * z + case.sigma * eps
    teacher, critic = (value.to(dtype) for value in case.denoisers(x_t))
    h = get_divergence(divergence).h(case.log_ratio(x_t).exp()) * (case.alpha / case.sigma) ** 2
    g = (h.to(dtype) * (critic - teacher)).double()
    return float((quadrature * g).sum()), float((quadrature * g * z).sum())


def test_gradient_pushes_the_student_towards_the_teacher(reference_backend):
    """With the teacher's mean above the student's, -g must push x up."""
    below = dataclasses.replace(Gaussians(), mean=-0.8)
    assert gradient(below, "reverse_kl", torch.float64)[0] < 0


def test_gradient_vanishes_where_student_and_teacher_agree(reference_backend):
    for divergence in PUBLISHED:
        agreed = Gaussians(mean=0.0, scale=1.0)
        found = gradient(agreed, divergence, torch.float64)
        assert found == pytest.approx((0, 0), abs=1e-9)
