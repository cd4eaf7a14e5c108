"""Kernel distance: against sums over pairs, without bias, and the deviation that it reports."""

from __future__ import annotations

import pytest
import torch

from fastdistill.evaluate import kernel_distance


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_sum_over_pairs():
    x, y = normal(7, 3, seed=1).double(), normal(7, 3, seed=2).double() + 0.5

    def k(a, b):
        return float((a @ b / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(7) for j in range(7)]
    expected = sum((k(x[i], x[j]) + k(y[i], y[j])) / 42 for i, j in pairs if i != j)
    expected -= 2 * sum(k(x[i], y[j]) for i, j in pairs) / 49
    found = kernel_distance(x, y, subsets=3, subset_size=7)
    assert found.mean == pytest.approx(expected, rel=1e-10)
    assert found.deviation == pytest.approx(0.0, abs=1e-12)


def test_it_has_no_bias_at_any_size():
    """Expectation of the kernel of Gaussians in closed form: degree 1, a shift of the mean."""
    values = [
        kernel_distance(normal(40, 4, seed=s), normal(40, 4, seed=100 + s) + 0.5, 1, size, 1).mean
        for size in (5, 40)
        for s in range(400)
    ]
    # degree 1: |difference of means|^2 / d = 4 * 0.25 / 4
    for own in (values[:400], values[400:]):
        assert sum(own) / 400 == pytest.approx(0.25, abs=0.06)


def test_it_sees_scale_and_is_small_for_equal_laws():
    real = normal(2000, 8, seed=1)
    same = kernel_distance(real, normal(2000, 8, seed=2), 20, 500)
    wide = kernel_distance(real, 1.3 * normal(2000, 8, seed=2), 20, 500)
    assert abs(same.mean) < 3 * same.deviation
    assert wide.mean > 5 * wide.deviation


def test_the_seed_alone_chooses_the_subsets():
    real, made = normal(50, 3, seed=1), normal(60, 3, seed=2)
    first = kernel_distance(real, made, 5, 20, seed=4)
    torch.manual_seed(9)
    assert kernel_distance(real, made, 5, 20, seed=4) == first
    assert kernel_distance(real, made, 5, 20, seed=5) != first


def test_bad_input_is_refused():
    real = normal(10, 3, seed=1)
    with pytest.raises(ValueError, match="subsets is 0"):
        kernel_distance(real, real, subsets=0)
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        kernel_distance(real, normal(10, 4, seed=1))
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(real[:1], real)
