"""Frechet distance: closed forms, an independent formula, invariances, and the real yardstick."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from fastdistill.evaluate import (
    GaussianStatistics,
    feature_statistics,
    frechet_distance,
    gaussian_statistics,
    matched_frechet_distance,
    real_split_distance,
)


def gaussian(mean, covariance) -> GaussianStatistics:
    as_tensor = lambda value: torch.as_tensor(value, dtype=torch.float64)  # noqa: E731
    return GaussianStatistics(as_tensor(mean), as_tensor(covariance), 1000)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_covariance(d: int, seed: int, rank: int | None = None) -> torch.Tensor:
    factor = normal(d, d if rank is None else rank, seed=seed)
    return factor @ factor.T


# --- the distance between known Gaussians ---------------------------------------------------------


def test_of_diagonal_gaussians_is_the_shift_and_the_difference_of_deviations_squared():
    a = gaussian([1.0, -2.0, 0.5], torch.diag(torch.tensor([4.0, 1.0, 0.25])))
    b = gaussian([0.0, 1.0, 0.5], torch.diag(torch.tensor([9.0, 0.0, 4.0])))
    # (1 + 9 + 0) + (2 - 3)^2 + (1 - 0)^2 + (0.5 - 2)^2
    assert frechet_distance(a, b) == pytest.approx(14.25, rel=1e-13)


def test_sees_the_scale_when_the_means_are_equal():
    a = gaussian(torch.zeros(5), torch.eye(5))
    b = gaussian(torch.zeros(5), 1.44 * torch.eye(5, dtype=torch.float64))
    assert frechet_distance(a, b) == pytest.approx(5 * 0.2**2, rel=1e-12)


def test_sees_correlation_when_means_and_variances_are_equal():
    a = gaussian([0.0, 0.0], [[1.0, 0.6], [0.6, 1.0]])
    b = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    expected = (1.6**0.5 - 1) ** 2 + (0.4**0.5 - 1) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_agrees_with_the_matrix_square_root_of_the_product(d):
    mean_a, mean_b = normal(d, seed=1), normal(d, seed=2)
    cov_a, cov_b = random_covariance(d, seed=3), random_covariance(d, seed=4)
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy())
    expected = np.square((mean_a - mean_b).numpy()).sum()
    expected += np.trace((cov_a + cov_b).numpy() - 2 * np.real(root))
    actual = frechet_distance(gaussian(mean_a, cov_a), gaussian(mean_b, cov_b))
    assert actual == pytest.approx(expected, rel=1e-9)


def test_is_symmetric():
    a = gaussian(normal(6, seed=1), random_covariance(6, seed=2))
    b = gaussian(normal(6, seed=3), random_covariance(6, seed=4, rank=2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_of_a_singular_gaussian_to_itself_is_zero_to_float64_rounding():
    # The root of a computed null eigenvalue would leave about sqrt(eps) = 1e-8 a dimension.
    statistics = gaussian(normal(60, seed=1), random_covariance(60, seed=2, rank=5))
    assert 0.0 <= frechet_distance(statistics, statistics) < 1e-11


def test_of_singular_gaussians_on_orthogonal_subspaces_is_the_sum_of_the_traces():
    a = gaussian(torch.zeros(4), torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0])))
    b = gaussian(torch.zeros(4), torch.diag(torch.tensor([0.0, 0.0, 3.0, 5.0])))
    assert frechet_distance(a, b) == pytest.approx(11.0, rel=1e-12)


def test_of_constant_samples_is_the_squared_distance_of_the_constants():
    a, b = torch.full((5, 3), 1.0), torch.full((7, 3), 3.0)
    assert frechet_distance(a, b) == pytest.approx(12.0, rel=1e-12)


# --- invariances ----------------------------------------------------------------------------------


def test_does_not_change_under_a_common_shift_and_rotation():
    a, b = normal(200, 8, seed=1), 0.5 * normal(150, 8, seed=2) + 1
    rotation = torch.linalg.qr(normal(8, 8, seed=3)).Q
    moved_a, moved_b = a @ rotation + 7, b @ rotation + 7
    assert frechet_distance(moved_a, moved_b) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_scales_with_the_square_of_a_common_factor():
    a, b = normal(200, 8, seed=1), 0.5 * normal(150, 8, seed=2) + 1
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * frechet_distance(a, b), rel=1e-10)


def test_of_a_set_and_the_same_set_shuffled_is_zero():
    a = normal(300, 8, seed=1)
    assert frechet_distance(a, a.flip(0)) < 1e-11


# --- moments --------------------------------------------------------------------------------------


def test_moments_are_the_unbiased_ones_of_numpy():
    features = normal(50, 4, seed=1, dtype=torch.float32)
    statistics = gaussian_statistics(features)
    wide = features.double().numpy()
    np.testing.assert_allclose(statistics.mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(wide.T, ddof=1), rtol=1e-12)
    assert statistics.count == 50
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64


def test_moments_of_a_stream_are_those_of_the_whole_set():
    features = normal(1000, 5, seed=1) * 3 + 2
    whole = gaussian_statistics(features)
    streamed = gaussian_statistics(batch for batch in features.split([1, 0, 7, 500, 492]))
    assert streamed.count == whole.count == 1000
    torch.testing.assert_close(streamed.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(streamed.covariance, whole.covariance, rtol=1e-12, atol=1e-13)


def test_moments_of_a_set_larger_than_one_chunk(monkeypatch):
    features = normal(100, 5, seed=1)
    whole = gaussian_statistics(features)
    monkeypatch.setattr("fastdistill.evaluate.frechet.ROWS_AT_ONCE", 13)
    chunked = gaussian_statistics(features)
    torch.testing.assert_close(chunked.covariance, whole.covariance, rtol=1e-12, atol=1e-14)


def test_moments_do_not_cancel_where_the_mean_is_large():
    features = normal(400, 3, seed=1)
    shifted = gaussian_statistics((features + 1e6).split(100))
    expected = gaussian_statistics(features).covariance
    torch.testing.assert_close(shifted.covariance, expected, rtol=1e-8, atol=1e-9)


def test_moments_of_half_precision_features_are_taken_in_float64():
    features = (normal(3000, 2, seed=1) + 50).bfloat16()
    expected = gaussian_statistics(features.double())
    torch.testing.assert_close(gaussian_statistics(features).covariance, expected.covariance)


def test_any_extractor_gives_the_features():
    """Batches of images through a callable, against the matrix square root of the product."""
    projection = normal(12, 5, seed=1)

    def extract(images):
        return (images.flatten(1) @ projection).tanh()[:, :, None, None]

    a, b = normal(300, 3, 2, 2, seed=2), 0.7 * normal(200, 3, 2, 2, seed=3) + 0.2
    found = frechet_distance(
        feature_statistics(a.split(70), extract), feature_statistics(b.split(70), extract)
    )
    fa, fb = (extract(x).flatten(1).numpy() for x in (a, b))
    ca, cb = np.cov(fa.T), np.cov(fb.T)
    root = np.real(scipy.linalg.sqrtm(ca @ cb))
    expected = np.square(fa.mean(0) - fb.mean(0)).sum() + np.trace(ca + cb - 2 * root)
    assert found == pytest.approx(expected, rel=1e-8)


# --- the yardstick --------------------------------------------------------------------------------


def test_two_real_halves_are_the_same_for_the_same_seed_whatever_the_global_generator():
    features = normal(101, 4, seed=1)
    torch.manual_seed(1)
    first = real_split_distance(features, splits=3, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert real_split_distance(features, splits=3, seed=5) == first
    assert real_split_distance(features, splits=3, seed=6) != first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_real_halves_are_disjoint_and_of_the_size_asked_for(monkeypatch):
    seen = []

    def record(a, b):
        seen.append((a.flatten().tolist(), b.flatten().tolist()))
        return float(len(seen))

    monkeypatch.setattr("fastdistill.evaluate.frechet.frechet_distance", record)
    features = torch.arange(11.0)[:, None]
    assert real_split_distance(features, splits=4) == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert [(len(a), len(b)) for a, b in seen] == [(5, 5)] * 4
    assert all(not set(a) & set(b) for a, b in seen)
    assert seen[0] != seen[1]
    real_split_distance(features, splits=1, size=3)
    assert [len(part) for part in seen[-1]] == [3, 3]


def test_a_perfect_generator_scores_what_two_real_halves_score():
    real, generated = normal(1200, 6, seed=1), normal(5000, 6, seed=2)
    yardstick = real_split_distance(real, splits=40)
    assert matched_frechet_distance(real, generated, splits=40) == pytest.approx(
        yardstick, rel=0.25
    )
    # The plain distance of unequal sets has another bias, and is no number to compare with.
    assert frechet_distance(real, generated) < 0.6 * yardstick


def test_a_generator_with_the_wrong_scale_scores_worse_than_two_real_halves():
    real, generated = normal(1200, 6, seed=1), 1.2 * normal(5000, 6, seed=2)
    assert matched_frechet_distance(real, generated) > 5 * real_split_distance(real)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_are_refused_with_their_number(value):
    features = normal(10, 3)
    features[4, 1] = features[4, 2] = value
    with pytest.raises(ValueError, match=r"2 of 30 elements are not finite, in 1 of 10 samples"):
        frechet_distance(features, normal(10, 3))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(gaussian([value], [[1.0]]), gaussian([0.0], [[1.0]]))


def test_fewer_than_two_samples_are_refused():
    for features in (normal(1, 3), normal(0, 3), [normal(0, 3), normal(1, 3)], []):
        with pytest.raises(ValueError, match="at least 2"):
            gaussian_statistics(features)
    with pytest.raises(ValueError, match="at least 4"):
        real_split_distance(normal(3, 2))


def test_different_numbers_of_dimensions_are_refused():
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(normal(10, 3), normal(10, 4))
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        gaussian_statistics([normal(10, 3), normal(10, 4)])
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        matched_frechet_distance(normal(10, 3), normal(10, 4))


def test_what_is_not_a_covariance_is_refused():
    good = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), good)
    with pytest.raises(ValueError, match="not symmetric"):
        frechet_distance(gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), good)
    with pytest.raises(ValueError, match=r"expected \[d\] and \[d, d\]"):
        frechet_distance(gaussian([0.0, 0.0], [[1.0]]), good)


def test_features_that_are_not_rows_of_floats_are_refused():
    with pytest.raises(ValueError, match="expected floating-point features"):
        gaussian_statistics(torch.zeros(4, 1, 8, 8))
    with pytest.raises(ValueError, match="expected floating-point features"):
        gaussian_statistics(torch.zeros(4, 3, dtype=torch.int64))


def test_sizes_that_the_data_cannot_give_are_refused():
    with pytest.raises(ValueError, match="expected 2 to 5 samples"):
        real_split_distance(normal(10, 2), size=6)
    with pytest.raises(ValueError, match="expected 2 to 4 samples"):
        matched_frechet_distance(normal(10, 2), normal(4, 2), size=5)
    with pytest.raises(ValueError, match="splits is 0"):
        real_split_distance(normal(10, 2), splits=0)
