"""Rewards (Diff-Instruct++, Diff-Instruct*) and ESD's entropy: closed forms and fixed points."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gaussian_methods import Case, Gaussian, make, some_cases, standard_case, student_gradient
from torch import Tensor

from fastdistill.objectives import (
    DistributionMatching,
    LinearReward,
    MatchingSettings,
    QuadraticReward,
    ScoreProjection,
    ScoreProjectionMethod,
)

CASES = pytest.mark.parametrize("case", some_cases(), ids=["edm", "vp", "flow"])
SLOPE = 0.7


def at(case: Case, mean: float, variance_q: float) -> Case:
    """The configuration whose student has this mean, and this variance when noised."""
    g = case.gaussians
    scale = max((variance_q - g.sigma**2) / g.alpha**2, 0.0) ** 0.5
    return dataclasses.replace(case, gaussians=dataclasses.replace(g, mean=mean, scale=scale))


def plus_plus(case: Case, weight: float) -> DistributionMatching:
    """Diff-Instruct++ with a linear reward; the weight is the paper's, beside a KL of scores."""
    g = case.gaussians
    settings = MatchingSettings(normalise=False, reward_weight=weight * g.sigma**2 / g.alpha**2)
    return make(DistributionMatching, case, settings, reward=LinearReward(SLOPE))


def star(case: Case, weight: float, reward=None, **changes) -> ScoreProjection:
    """Diff-Instruct* with squared L2; the weight is the paper's, beside a distance of scores."""
    g = case.gaussians
    settings = ScoreProjectionMethod(
        name="score_projection",
        student_times=(1.0,),
        reward={"name": "linear"},
        reward_weight=weight * (g.sigma**2 / g.alpha) ** 2,
        **changes,
    )
    return make(ScoreProjection, case, settings, reward=reward or LinearReward(SLOPE))


@CASES
def test_reverse_kl_with_a_linear_reward_rests_where_its_closed_form_says(case):
    """m / v_p alpha^2 = weight a at v_q = v_p; anywhere else something moves."""
    weight, g = 0.3, case.gaussians
    mean = weight * SLOPE * g.variance_p / g.alpha**2
    rest = at(case, mean, g.variance_p)
    assert student_gradient(plus_plus(rest, weight), rest) == pytest.approx((0, 0), abs=1e-9)
    for other in (at(case, mean + 0.1, g.variance_p), at(case, mean, 0.9 * g.variance_p)):
        found = student_gradient(plus_plus(other, weight), other)
        assert max(map(abs, found)) > 1e-4, case


@CASES
def test_implicit_matching_with_a_linear_reward_rests_where_its_closed_form_says(case):
    """2 m alpha^2 / (v_p v_q) = weight a at v_q = v_p: half the weight a v_p^2 / alpha^2."""
    weight, g = 0.3, case.gaussians
    mean = weight * SLOPE * g.variance_p**2 / (2 * g.alpha**2)
    rest = at(case, mean, g.variance_p)
    assert student_gradient(star(rest, weight), rest) == pytest.approx((0, 0), abs=1e-9)
    for other in (at(case, mean + 0.1, g.variance_p), at(case, mean, 0.9 * g.variance_p)):
        found = student_gradient(star(other, weight), other)
        assert max(map(abs, found)) > 1e-5, case


@CASES
@pytest.mark.parametrize("method", [star, plus_plus])
def test_a_reward_adds_minus_its_weighted_gradient(case, method):
    weight, g = 0.4, case.gaussians
    objective = method(case, weight)
    scale = objective.settings.reward_weight
    bare = type(objective.settings)
    plain = (
        bare(name="score_projection", student_times=(1.0,))
        if method is star
        else MatchingSettings(normalise=False)
    )
    kind = type(objective)
    without = student_gradient(make(kind, case, plain), case)
    found = student_gradient(objective, case)
    difference = [a - b for a, b in zip(found, without, strict=True)]
    assert difference == pytest.approx((-scale * SLOPE, 0.0), rel=1e-9, abs=1e-12)
    objective._reward = (QuadraticReward(1.5),)  # E -(m + s z - 1.5)^2 / 2
    found = student_gradient(objective, case)
    difference = [a - b for a, b in zip(found, without, strict=True)]
    expected = (scale * (g.mean - 1.5), scale * g.scale)
    assert difference == pytest.approx(expected, rel=1e-9), case


class OfSingleSamples(Gaussian):
    """A critic whose condition tells the sample itself: its posterior is a point.

    A condition is (sample, 1), and (0, 0) the null one, for which it is the Gaussian of all.
    """

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        marginal = super().forward(x, t, None)
        known = condition[:, 1:]
        return known * condition[:, :1] + (1 - known) * marginal


class _Teacher(Gaussian):
    """A teacher that the condition tells nothing."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return super().forward(x, t, None)


def entropic(case: Case, entropy_weight: float) -> tuple[float, float]:
    """ESD's gradient to (mean, scale), of scores."""
    g = case.gaussians
    settings = MatchingSettings(
        normalise=False, entropy_weight=entropy_weight, critic_condition_dropout=0.5
    )
    critic = OfSingleSamples(case, g.mean, g.scale)
    objective = make(DistributionMatching, case, settings, critic=critic)
    objective.teacher.network = _Teacher(case, 0.0, g.teacher_variance**0.5)
    objective.teacher.requires_grad_(False)
    own = {
        "condition": lambda z: torch.stack((g.mean + g.scale * z, torch.ones_like(z)), dim=1),
        "uncondition": lambda z: torch.zeros(len(z), 2, dtype=torch.float64),
    }
    found = student_gradient(objective, case, **own)
    return tuple(value * g.alpha**2 / g.sigma**2 for value in found)


@CASES
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_entropy_rests_at_its_share_of_the_teachers_variance(case, share):
    """Its fixed point is m = 0 and v_q = lambda v_p, where the noise alone is not more."""
    g = case.gaussians
    wide = dataclasses.replace(
        case, gaussians=dataclasses.replace(g, teacher_variance=8 * g.sigma**2 / g.alpha**2)
    )
    rest = at(wide, 0.0, share * wide.gaussians.variance_p)
    assert entropic(rest, share) == pytest.approx((0, 0), abs=1e-9)
    for other in (
        at(rest, 0.2, rest.gaussians.variance_q),
        at(rest, 0.0, 1.1 * rest.gaussians.variance_q),
    ):
        assert max(map(abs, entropic(other, share))) > 1e-4


@pytest.mark.parametrize(("share", "variance"), [(0.25, 0.3240), (0.5, 0.8827), (1.0, 2.0)])
def test_entropy_has_its_published_fixed_points(share, variance):
    """v_p = 2, alpha = 0.9, sigma = 0.436, in 1-D: any process will do that has them."""

    class Process(type(standard_case().process)):
        def alpha_sigma(self, t):
            return type(super().alpha_sigma(t))(torch.full_like(t, 0.9), torch.full_like(t, 0.436))

    g = dataclasses.replace(
        standard_case().gaussians, teacher_variance=2.0, alpha=0.9, sigma=0.436, mean=0.0
    )
    case = Case(Process(), 0.5, dataclasses.replace(g, scale=variance**0.5))
    assert entropic(case, share) == pytest.approx((0, 0), abs=2e-4)


@CASES
def test_entropys_gradient_does_not_vanish_where_student_and_teacher_agree(case):
    """It is (1 - lambda) alpha^2 s / v_p for the scale; lambda = 1 alone vanishes."""
    g = case.gaussians
    agreed = at(case, 0.0, g.variance_p)
    scale = agreed.gaussians.scale
    for share in (0.3, 1.0, 1.5):
        expected = (1 - share) * g.alpha**2 * scale / g.variance_p
        assert entropic(agreed, share) == pytest.approx((0, expected), rel=1e-9, abs=1e-9), case


def test_entropy_zero_is_the_plain_method_with_one_pass_of_the_critic():
    case = standard_case()
    plain = make(DistributionMatching, case, MatchingSettings(normalise=False))
    expected = student_gradient(plain, case)
    settings = MatchingSettings(normalise=False, critic_condition_dropout=0.5)
    dropped = make(DistributionMatching, case, settings)
    assert student_gradient(dropped, case) == pytest.approx(expected)
    assert dropped.critic.network.calls == 1


def test_a_reward_needs_its_weight():
    case = standard_case()
    with pytest.raises(ValueError, match="give both or neither"):
        make(DistributionMatching, case, MatchingSettings(), reward=LinearReward())
    with pytest.raises(ValueError, match="give both or neither"):
        make(DistributionMatching, case, MatchingSettings(reward_weight=1.0))
    with pytest.raises(ValueError, match="critic_condition_dropout"):
        MatchingSettings(entropy_weight=0.5)
