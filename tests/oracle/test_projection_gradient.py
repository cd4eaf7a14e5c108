"""Score-projection losses (SIM, SiD) against closed forms, for a mean and a scale.

The networks are exact denoisers with frozen parameters and a live input, so that the gradient
runs through d'(y), through both networks and through the conditional score. Expectations are
Gauss-Hermite quadratures: the only error is rounding.
"""

from __future__ import annotations

import pytest
import torch
from gaussians import Gaussians, random_configurations

from fastdistill.diffusion import Epsilon
from fastdistill.ops import Distance, projection_cotangents, use_backend

SIM_L2 = (2.098361, -3.302338)
SIM_PSEUDO_HUBER = (0.895954, -1.130731)
SID = {0.5: (0.512, -1.228470), 1.0: (1.049180, -1.651169)}
ORDER = 80


def gradient(
    case: Gaussians,
    distance: Distance,
    alpha: float = 1.0,
    weight: float = 1.0,
    dtype: torch.dtype = torch.float64,
    detach_gap: bool = False,
    order: int = ORDER,
) -> tuple[float, float]:
    """(dL/dm, dL/ds) of the loss in score space, told to the op as two epsilon networks."""
    mean = torch.tensor(case.mean, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(case.scale, dtype=torch.float64, requires_grad=True)
    z, eps, quadrature = case.nodes(order)
    x0 = mean + scale * z
    x_t = case.alpha * x0 + case.sigma * eps
    seen = x_t.detach() if detach_gap else x_t
    outputs = [(seen - case.alpha * d) / case.sigma for d in case.denoisers(seen)]
    level = [torch.full_like(z, value) for value in (case.alpha, case.sigma)]
    coefficients = Epsilon().coefficients(*level)
    tensors = [value.to(dtype)[:, None] for value in (x0, x_t, *outputs)]
    result = projection_cotangents(
        tensors[0],
        tensors[1],
        tensors[2],
        coefficients,
        tensors[3],
        coefficients,
        distance=distance,
        alpha=alpha,
        score_scale=level[0] / level[1] ** 2,
        weight=torch.full_like(z, weight),
    )
    total = (quadrature * result.loss.double()).sum()
    return tuple(float(g) for g in torch.autograd.grad(total, (mean, scale)))


def score_divergence_gradient(
    case: Gaussians, distance: Distance, path: bool = False
) -> tuple[float, float]:
    """Gradient of E d(s_psi - s_phi): of the scores at fixed x_t, or of x_t under fixed scores."""
    mean = torch.tensor(case.mean, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(case.scale, dtype=torch.float64, requires_grad=True)
    z, eps, quadrature = case.nodes(ORDER)
    x_t = case.alpha * (mean + scale * z) + case.sigma * eps
    m, s = (mean.detach(), scale.detach()) if path else (mean, scale)
    x_t = x_t if path else x_t.detach()
    student = -(x_t - case.alpha * m) / (case.alpha**2 * s**2 + case.sigma**2)
    square = (student + x_t / case.variance_p) ** 2 + distance.offset**2
    total = (quadrature * square ** (distance.exponent / 2)).sum()
    return tuple(float(g) for g in torch.autograd.grad(total, (mean, scale)))


def test_implicit_matching_has_its_closed_form(reference_backend):
    case = Gaussians()
    m, s, v_p, v_q = case.mean, case.scale, case.variance_p, case.variance_q
    expected = 2 * m / (v_p * v_q), 4 * s / v_q * (1 / v_p - 1 / v_q)
    assert expected == pytest.approx(SIM_L2, abs=1e-6)
    assert gradient(case, Distance.squared_l2()) == pytest.approx(expected, abs=1e-9)
    found = gradient(case, Distance.pseudo_huber(0.5))
    assert found == pytest.approx(SIM_PSEUDO_HUBER, abs=2e-6)


@pytest.mark.parametrize("alpha", SID)
def test_identity_distillation_has_its_closed_form(alpha, reference_backend):
    found = gradient(Gaussians(), Distance.squared_l2(), alpha, weight=0.5)
    assert found == pytest.approx(SID[alpha], abs=2e-6)


@pytest.mark.parametrize("case", list(random_configurations()), ids=["edm", "vp", "flow"])
@pytest.mark.parametrize(
    "distance", [Distance.squared_l2(), Distance.pseudo_huber(0.7), Distance.power(4.0)], ids=str
)
def test_implicit_matching_is_the_gradient_at_a_frozen_law(case, distance, reference_backend):
    """alpha = 1: the gradient of E d(s_psi - s_phi) with x_t's law fixed, for any distance."""
    expected = score_divergence_gradient(case, distance)
    assert gradient(case, distance) == pytest.approx(expected, rel=1e-6, abs=1e-9), case


@pytest.mark.parametrize("case", list(random_configurations()), ids=["edm", "vp", "flow"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_alpha_mixes_the_path_gradient_in(case, alpha, reference_backend):
    """SiD = (1 - alpha) path + 1/2 SIM: alpha = 1/2 is half the gradient of the divergence."""
    square = Distance.squared_l2()
    law, path = (score_divergence_gradient(case, square, path) for path in (False, True))
    expected = [(1 - alpha) * along + a / 2 for a, along in zip(law, path, strict=True)]
    found = gradient(case, square, alpha, weight=0.5)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), case


def test_detaching_the_gap_is_seen_in_the_scale_and_not_in_the_mean(reference_backend):
    """The common mistake that a test of the mean alone lets pass."""
    mean, scale = gradient(Gaussians(), Distance.squared_l2(), detach_gap=True)
    assert mean != pytest.approx(SIM_L2[0], rel=0.1) or scale != pytest.approx(SIM_L2[1], rel=0.1)
    assert scale != pytest.approx(SIM_L2[1], rel=0.1)


def test_every_gradient_vanishes_where_student_and_teacher_agree(reference_backend):
    agreed = Gaussians(mean=0.0, scale=1.0)
    for distance in (Distance.squared_l2(), Distance.pseudo_huber(0.5), Distance.power(4.0)):
        for alpha in (0.5, 1.0, 1.2):
            assert gradient(agreed, distance, alpha) == pytest.approx((0, 0), abs=1e-9)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [Distance.squared_l2(), Distance.pseudo_huber(0.5)], ids=str)
def test_backends_are_as_exact_as_torch(distance, dtype, backend):
    """Error against float64 at most twice that of the reference in the same storage."""
    with use_backend("reference"):
        exact = gradient(Gaussians(), distance, order=16)
        plain = gradient(Gaussians(), distance, dtype=dtype, order=16)
    with use_backend(backend):
        found = gradient(Gaussians(), distance, dtype=dtype, order=16)
    floor = torch.finfo(dtype).eps
    for mine, torchs, truth in zip(found, plain, exact, strict=True):
        assert abs(mine - truth) <= 2 * abs(torchs - truth) + floor * abs(truth)
