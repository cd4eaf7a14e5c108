"""SIM, SiD, SiDA and Diff-Instruct*: closed forms and fixed points, through the objective.

Numbers in score space are those of the objective's denoiser space times (alpha / sigma^2)^2, with
pseudo-Huber's c times alpha / sigma^2.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gaussian_methods import Case, Gaussian, make, some_cases, standard_case, student_gradient
from torch import nn

from fastdistill.objectives import Discriminator, ScoreProjection, ScoreProjectionMethod
from fastdistill.ops import Distance

SIM_L2 = (2.098361, -3.302338)
SIM_PSEUDO_HUBER = (0.895954, -1.130731)
SID = {0.5: (0.512, -1.228470), 1.0: (1.049180, -1.651169)}
FISHER = (1.024, -2.456940)
CASES = pytest.mark.parametrize("case", some_cases(), ids=["edm", "vp", "flow"])


def settings(**changes) -> ScoreProjectionMethod:
    return ScoreProjectionMethod(name="score_projection", student_times=(1.0,), **changes)


def score_scale(case: Case) -> float:
    return case.gaussians.alpha / case.gaussians.sigma**2


def projected(case: Case, alpha: float = 1.0, offset: float | None = None, **parts):
    """Score-space gradient to (mean, scale) of squared L2, or pseudo-Huber with this offset."""
    k = score_scale(case)
    distance = "squared_l2" if offset is None else f"pseudo_huber:{offset / k!r}"
    chosen = settings(distance=distance, alpha=alpha)
    found = student_gradient(make(ScoreProjection, case, chosen, **parts), case)
    power = 2 if offset is None else 1
    return tuple(value * k**power for value in found)


def score_divergence_gradient(case: Case, distance: Distance, path: bool = False):
    """Gradient of E d(s_psi - s_phi): of the scores at fixed x_t, or of x_t under fixed scores."""
    g = case.gaussians
    mean = torch.tensor(g.mean, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(g.scale, dtype=torch.float64, requires_grad=True)
    z, eps, weights = g.nodes(60)
    x_t = g.alpha * (mean + scale * z) + g.sigma * eps
    m, s = (mean.detach(), scale.detach()) if path else (mean, scale)
    x_t = x_t if path else x_t.detach()
    student = -(x_t - g.alpha * m) / (g.alpha**2 * s**2 + g.sigma**2)
    square = (student + x_t / g.variance_p) ** 2 + distance.offset**2
    total = (weights * square ** (distance.exponent / 2)).sum()
    return tuple(float(value) for value in torch.autograd.grad(total, (mean, scale)))


def test_implicit_matching_has_its_published_numbers():
    assert projected(standard_case()) == pytest.approx(SIM_L2, abs=1e-6)
    assert projected(standard_case(), offset=0.5) == pytest.approx(SIM_PSEUDO_HUBER, abs=2e-6)


@CASES
def test_implicit_matching_is_the_gradient_at_a_frozen_law(case):
    g = case.gaussians
    closed = (
        2 * g.alpha**2 * g.mean / (g.variance_p * g.variance_q),
        4 * g.alpha**2 * g.scale / g.variance_q * (1 / g.variance_p - 1 / g.variance_q),
    )
    assert projected(case) == pytest.approx(closed, rel=1e-6), case
    offset = score_scale(case)  # c = 1 in denoiser space: smooth enough for the quadrature
    expected = score_divergence_gradient(case, Distance.pseudo_huber(offset))
    assert projected(case, offset=offset) == pytest.approx(expected, rel=1e-5), case


@pytest.mark.parametrize("alpha", SID)
def test_identity_distillation_has_its_published_numbers(alpha):
    """SiD's loss is the squared distance's with weight 1/2."""
    found = [value / 2 for value in projected(standard_case(), alpha)]
    assert found == pytest.approx(SID[alpha], abs=2e-6)


def test_alpha_one_half_is_half_of_fishers_gradient_and_one_is_half_of_sims():
    half = [value / 2 for value in projected(standard_case(), 0.5)]
    assert half == pytest.approx([value / 2 for value in FISHER], abs=2e-6)
    one = [value / 2 for value in projected(standard_case(), 1.0)]
    assert one == pytest.approx([value / 2 for value in SIM_L2], abs=2e-6)


@CASES
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_alpha_mixes_the_path_gradient_in(case, alpha):
    law, path = (
        score_divergence_gradient(case, Distance.squared_l2(), path) for path in (False, True)
    )
    expected = [2 * (1 - alpha) * along + at for at, along in zip(law, path, strict=True)]
    assert projected(case, alpha) == pytest.approx(expected, rel=1e-6, abs=1e-9), case


class _Detached(Gaussian):
    """A network that a careless trainer runs on a detached input."""

    def forward(self, x, t, condition):
        return super().forward(x.detach(), t, condition) + 0 * x


@CASES
def test_a_detached_teacher_is_seen_in_the_scale_and_not_in_the_mean(case):
    """The mistake that a test of the mean alone lets pass; a detached critic shows in both."""
    g = case.gaussians
    right = student_gradient(make(ScoreProjection, case, settings()), case)
    careless = make(ScoreProjection, case, settings())
    careless.teacher.network = _Detached(case, 0.0, g.teacher_variance**0.5).requires_grad_(False)
    mean, scale = student_gradient(careless, case)
    assert mean == pytest.approx(right[0], rel=1e-9)
    assert scale != pytest.approx(right[1], rel=0.1), case
    critic = _Detached(case, g.mean, g.scale)
    found = student_gradient(make(ScoreProjection, case, settings(), critic=critic), case)
    assert found[0] != pytest.approx(right[0], rel=0.1), case
    assert found[1] != pytest.approx(right[1], rel=0.1), case


@CASES
@pytest.mark.parametrize("distance", ["squared_l2", "pseudo_huber:0.5", "power:4"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_nothing_moves_where_student_and_teacher_agree(case, distance, alpha):
    scale = case.gaussians.teacher_variance**0.5
    agreed = dataclasses.replace(
        case, gaussians=dataclasses.replace(case.gaussians, mean=0.0, scale=scale)
    )
    chosen = settings(distance=distance, alpha=alpha, normalise=True)
    found = student_gradient(make(ScoreProjection, agreed, chosen), agreed)
    assert found == pytest.approx((0, 0), abs=1e-9)


@CASES
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_guidance_inside_is_of_a_teacher_with_the_guided_mean(case, guidance_scale):
    """D = D_none + scale (D_cond - D_none): a condition's shift of the mean counts scale times."""
    shift = 0.2
    chosen = settings(guidance_scale=guidance_scale)
    conditions = {"condition": lambda z: 0 * z + shift, "uncondition": lambda z: 0 * z}
    g = case.gaussians
    objective = make(ScoreProjection, case, chosen, critic=Gaussian(case, g.mean - shift, g.scale))
    found = student_gradient(objective, case, **conditions)
    assert objective.teacher.network.calls == 1
    direct = make(ScoreProjection, case, settings(), teacher_mean=guidance_scale * shift)
    assert found == pytest.approx(student_gradient(direct, case), rel=1e-9), case


@CASES
def test_guidance_outside_raises_the_conditions_log_probability(case):
    """Its gradient is that of -(scale - 1) E log p_t(x_t | c) / p_t(x_t), in denoiser space."""
    shift, scale, g = 0.2, 3.0, case.gaussians
    conditions = {"condition": lambda z: 0 * z + shift, "uncondition": lambda z: 0 * z}

    def gradient(guidance_scale):
        chosen = settings(guidance_scale=guidance_scale, guidance="outside")
        critic = Gaussian(case, g.mean - shift, g.scale)
        return student_gradient(
            make(ScoreProjection, case, chosen, critic=critic), case, **conditions
        )

    found = [a - b for a, b in zip(gradient(scale), gradient(1.0), strict=True)]
    # log p_t(x|c) / p_t(x) has slope alpha shift / v_p in x_t; denoisers are sigma^2 / alpha scores
    slope = g.sigma**2 / g.alpha * g.alpha * shift / g.variance_p
    expected = -(scale - 1) * slope * g.alpha
    assert found == pytest.approx((expected, 0.0), rel=1e-9, abs=1e-12), case


@CASES
@pytest.mark.parametrize("normalise", [False, True])
def test_gan_term_of_sida_is_the_gradient_through_the_critics_features(case, normalise):
    """Against autograd of softplus(-logit) / mean |x - D|, the latter detached."""
    torch.manual_seed(0)
    discriminator = Discriminator(Gaussian.feature_shapes)
    discriminator.heads = nn.ModuleList(
        [nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 1))]
    )

    def gradient(weight):
        parts = {"discriminator": discriminator} if weight else {}
        chosen = settings(gan_weight=weight, normalise=normalise)
        return student_gradient(make(ScoreProjection, case, chosen, **parts), case, order=20)

    found = [a - b for a, b in zip(gradient(0.7), gradient(0.0), strict=True)]
    g = case.gaussians
    mean = torch.tensor(g.mean, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(g.scale, dtype=torch.float64, requires_grad=True)
    z, eps, weights = g.nodes(20)
    x = (mean + scale * z)[:, None]
    x_t = g.alpha * x + g.sigma * eps[:, None]
    features = torch.cat((x_t * g.scale, x_t**2), dim=1)
    loss = 0.7 * nn.functional.softplus(-discriminator([features])).double()
    if normalise:
        teacher = g.denoisers(x_t.detach())[0]
        loss = loss / (x.detach() - teacher).abs()
    expected = torch.autograd.grad((weights[:, None] * loss).sum(), (mean, scale))
    assert found == pytest.approx([float(value) for value in expected], rel=1e-4), case
