"""Improved precision and recall on sets whose answer is known."""

from __future__ import annotations

import pytest
import torch

from fastdistill.evaluate import density_coverage, precision_recall


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def line(*positions: float) -> torch.Tensor:
    return torch.tensor(positions)[:, None]


def test_identical_sets_have_precision_and_recall_one():
    real = normal(100, 5, seed=1)
    assert precision_recall(real, real.flip(0)) == (1.0, 1.0)


def test_far_apart_sets_have_precision_and_recall_zero():
    real = normal(100, 5, seed=1)
    assert precision_recall(real, normal(100, 5, seed=2) + 100) == (0.0, 0.0)


def test_a_dropped_mode_costs_recall_and_not_precision():
    left, right = normal(80, 3, seed=1), normal(40, 3, seed=2) + 100
    result = precision_recall(torch.cat([left, right]), left)
    assert result.precision == 1.0
    assert result.recall == pytest.approx(80 / 120)


def test_an_invented_mode_costs_precision_and_not_recall():
    left, right = normal(80, 3, seed=1), normal(40, 3, seed=2) + 100
    result = precision_recall(left, torch.cat([left, right]))
    assert result.precision == pytest.approx(80 / 120)
    assert result.recall == 1.0


def test_the_radius_is_the_distance_to_the_kth_other_point():
    real = line(0.0, 1.0, 3.0, 7.0, 15.0)
    # Radii for k=1: 1, 1, 2, 4, 8, so that the manifold is [-1, 5] u [3, 11] u [7, 23].
    # For k=2: 3, 2, 3, 6, 12, so that it is [-3, 6] u [1, 13] u [3, 27].
    generated = line(-1.01, -1.0, 22.9, 23.1)
    assert precision_recall(real, generated, k=1).precision == pytest.approx(2 / 4)
    assert precision_recall(real, generated, k=2).precision == pytest.approx(1.0)
    assert precision_recall(real, line(-3.01, -2.99, 26.9, 27.1), k=2).precision == 0.5


def test_recall_takes_its_radii_from_the_generated_set():
    generated = line(0.0, 1.0, 3.0, 7.0, 15.0)
    assert precision_recall(line(-1.01, -1.0, 22.9, 23.1), generated, k=1).recall == 0.5


def test_k_is_three_unless_said():
    real, generated = normal(60, 2, seed=1), normal(60, 2, seed=2)
    assert precision_recall(real, generated) == precision_recall(real, generated, k=3)
    assert precision_recall(real, generated) != precision_recall(real, generated, k=2)


def test_a_collapsed_generator_has_no_recall_even_far_from_the_origin():
    # Distances by |x|^2 + |y|^2 - 2 x.y would give the repeated sample a radius by cancellation.
    real = 1000 + 1e-2 * normal(200, 16, seed=1)
    generated = real[:1].repeat(200, 1)
    result = precision_recall(real, generated)
    assert result.precision == 1.0
    assert result.recall == pytest.approx(1 / 200)


@pytest.mark.parametrize("at_once", [1, 130, 1000])
def test_chunks_give_what_the_whole_gives(monkeypatch, at_once):
    real, generated = normal(70, 4, seed=1), 1.5 * normal(50, 4, seed=2) + 1
    whole = precision_recall(real, generated)
    monkeypatch.setattr("fastdistill.evaluate.neighbours.DISTANCES_AT_ONCE", at_once)
    assert precision_recall(real, generated) == whole
    assert 0.0 < whole.precision < 1.0
    assert 0.0 < whole.recall < 1.0


def test_no_more_distances_than_allowed_are_in_memory_together(monkeypatch):
    sizes = []
    original = torch.cdist

    def record(a, b, **options):
        sizes.append(a.shape[0] * b.shape[0])
        return original(a, b, **options)

    monkeypatch.setattr("fastdistill.evaluate.neighbours.DISTANCES_AT_ONCE", 500)
    monkeypatch.setattr(torch, "cdist", record)
    precision_recall(normal(70, 4, seed=1), normal(50, 4, seed=2))
    assert sum(sizes) == 70 * 70 + 50 * 50 + 2 * 70 * 50
    assert max(sizes) <= 500


def test_half_precision_features_are_compared_in_float32():
    real, generated = normal(60, 4, seed=1).bfloat16(), normal(60, 4, seed=2).bfloat16()
    assert precision_recall(real, generated) == precision_recall(real.float(), generated.float())


def test_bad_input_is_refused():
    real = normal(10, 3, seed=1)
    with pytest.raises(ValueError, match="generated has 3 samples; at least 4"):
        precision_recall(real, real[:3])
    with pytest.raises(ValueError, match="real has 3 samples; at least 4"):
        precision_recall(real[:3], real)
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall(real, real, k=0)
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        precision_recall(real, normal(10, 4, seed=1))
    with pytest.raises(ValueError, match="generated: 3 of 30 elements are not finite"):
        precision_recall(real, torch.cat([real[:9], torch.full((1, 3), float("nan"))]))


# --- density and coverage -------------------------------------------------------------------------


def test_balls_are_counted_for_density_and_held_for_coverage():
    real = line(0.0, 1.0, 3.0, 7.0, 15.0)
    # k=1 balls: [-1, 1], [0, 2], [1, 5], [3, 11], [7, 23]
    found = density_coverage(real, line(0.5, 0.6, 4.0, 100.0), k=1)
    assert found.density == pytest.approx((2 + 2 + 2 + 0) / 4)
    assert found.coverage == pytest.approx(4 / 5)


def test_density_is_about_one_and_coverage_as_the_lemma_says_for_equal_laws():
    """arXiv 2002.09797, lemma 2: E coverage = 1 - (n-1)...(n-k) / ((2n-1)...(2n-k))."""
    n, k = 300, 5
    found = [
        density_coverage(normal(n, 4, seed=s), normal(n, 4, seed=100 + s), k) for s in range(8)
    ]
    expected = 1.0
    for i in range(1, k + 1):
        expected *= (n - i) / (2 * n - i)
    assert sum(pair.density for pair in found) / 8 == pytest.approx(1.0, abs=0.05)
    assert sum(pair.coverage for pair in found) / 8 == pytest.approx(1 - expected, abs=0.01)


def test_an_outlier_is_recalled_but_covers_nothing():
    """One far generated sample blows up recall's balls; coverage looks at the real ones alone."""
    real = normal(100, 2, seed=1)
    generated = torch.cat((normal(4, 2, seed=2) * 200, real[:1].repeat(50, 1)))
    assert precision_recall(real, generated).recall > 0.9
    assert density_coverage(real, generated).coverage < 0.2


def test_a_dropped_mode_costs_coverage_and_not_density():
    left, right = normal(80, 3, seed=1), normal(40, 3, seed=2) + 100
    found = density_coverage(torch.cat([left, right]), left)
    assert found.density > 1
    assert found.coverage == pytest.approx(80 / 120)
