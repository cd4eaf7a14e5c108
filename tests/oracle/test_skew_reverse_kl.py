"""The skewed reverse KL, added as `docs/adding-an-objective.md` tells it: one entry, this proof."""

from __future__ import annotations

import pytest
import torch
from gaussians import Gaussians, random_configurations
from test_gradient_theorem import divergence_gradient, gradient

from fastdistill.objectives import get_divergence


def test_weight_is_that_of_its_generator():
    divergence = get_divergence("skew_reverse_kl:0.3")
    r = torch.linspace(0.05, 9, 50, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(divergence.f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(divergence.h(r), r**2 * second)
    one = torch.ones((), dtype=torch.float64)
    assert float(divergence.f(one)) == pytest.approx(0)


@pytest.mark.parametrize(
    "case", [Gaussians(), *random_configurations()], ids=["published", "edm", "vp", "flow"]
)
@pytest.mark.parametrize("pi", [0.1, 0.7])
def test_gradient_is_that_of_the_divergence_for_mean_and_scale(case, pi, reference_backend):
    name = f"skew_reverse_kl:{pi}"
    found = gradient(case, name, torch.float64)
    assert found == pytest.approx(divergence_gradient(case, name), rel=1e-4, abs=1e-6), case


def test_near_one_it_is_the_reverse_kl(reference_backend):
    found = gradient(Gaussians(), "skew_reverse_kl:0.999999", torch.float64)
    assert found == pytest.approx(gradient(Gaussians(), "reverse_kl", torch.float64), rel=1e-4)


def test_the_share_of_the_teacher_lies_between_zero_and_one():
    for wrong in ("skew_reverse_kl:0", "skew_reverse_kl:1.5"):
        with pytest.raises(ValueError, match="weight must lie between 0 and 1"):
            get_divergence(wrong)
