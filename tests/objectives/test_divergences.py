"""The f-table: h = r^2 f'' by autograd, f(1) = 0, E_q[h] in closed cases, and names."""

from __future__ import annotations

import pytest
import torch

from fastdistill.objectives import divergence_names, get_divergence

NAMES = [
    *(name for name in divergence_names() if ":" not in name),
    "alpha:-1",
    "alpha:0.3",
    "alpha:2.5",
    "skew_jensen_shannon:0.3",
]


@pytest.mark.parametrize("name", NAMES)
def test_h_is_the_second_derivative_of_f_times_r_squared(name):
    ratio = torch.logspace(-1.5, 1.5, 61, dtype=torch.float64, requires_grad=True)
    divergence = get_divergence(name)
    (first,) = torch.autograd.grad(divergence.f(ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratio)
    torch.testing.assert_close(divergence.h(ratio), second * ratio**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_divergence_of_equal_distributions_is_zero(name):
    assert float(get_divergence(name).f(torch.ones((), dtype=torch.float64))) == pytest.approx(0)


def test_the_alpha_family_contains_its_relatives():
    ratio = torch.logspace(-1, 1, 9, dtype=torch.float64)
    hellinger, pearson = get_divergence("squared_hellinger"), get_divergence("pearson")
    torch.testing.assert_close(get_divergence("alpha:0.5").h(ratio), 4 * hellinger.h(ratio))
    torch.testing.assert_close(get_divergence("alpha:2").h(ratio), pearson.h(ratio) / 2)


def test_only_reverse_kl_needs_no_density_ratio():
    assert [name for name in NAMES if not get_divergence(name).needs_ratio] == ["reverse_kl"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("jensen_shanon", "did you mean jensen_shannon"),
        ("total_variation", "vanishes"),
        ("alpha:1", "forward_kl"),
        ("skew_jensen_shannon:1.5", "between 0 and 1"),
    ],
)
def test_an_unusable_name_is_refused_with_a_hint(name, hint):
    with pytest.raises(ValueError, match=hint):
        get_divergence(name)
