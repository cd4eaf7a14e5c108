"""Fits against the plain covariance: any order, batches and ranks, sketches, and bad input."""

from __future__ import annotations

import pytest
import torch

from fastdistill.gaussian import Fit, Fitter, cluster_centres, fit_gaussian, moments
from fastdistill.gaussian.principal import (
    principal_of_matrix,
    principal_of_sketch,
    sketching_matrix,
)


def samples(count=60, shape=(2, 5), seed=0, shift=3.0):
    """Correlated float64 samples with a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.Size(shape).numel()
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    z = torch.randn(count, d, generator=generator, dtype=torch.float64)
    return (z @ mix + shift).reshape(count, *shape)


def moments_of(x):
    rows = x.flatten(1).double()
    return rows.mean(0), (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)


def covariance(gaussian):
    rest = torch.eye(gaussian.mean.numel(), dtype=torch.float64) - gaussian.basis @ gaussian.basis.T
    return gaussian.basis * gaussian.variances @ gaussian.basis.T + gaussian.floor * rest


def test_a_fit_of_full_rank_has_the_moments_of_the_samples():
    x = samples()
    gaussian = fit_gaussian(x.split(7), rank=10, about=Fit(0, "noise"))
    mean, expected = moments_of(x)
    torch.testing.assert_close(gaussian.mean.flatten(), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance(gaussian), expected, rtol=1e-11, atol=1e-11)
    assert (gaussian.fit.samples, gaussian.fit.source) == (60, "noise")


def test_what_is_left_out_goes_into_the_floor_and_is_reported_by_rank():
    x = samples()
    gaussian = fit_gaussian([x], rank=4)
    _, expected = moments_of(x)
    values = torch.linalg.eigvalsh(expected).flip(0)
    torch.testing.assert_close(gaussian.variances, values[:4])
    assert gaussian.floor == pytest.approx(float(values[4:].mean()), rel=1e-12)
    left = [1 - float(values[:k].sum() / values.sum()) for k in range(5)]
    assert gaussian.fit.left_out == pytest.approx(left, abs=1e-12)
    assert gaussian.fit.total_variance == pytest.approx(float(values.sum()))


@pytest.fixture
def small_chunks(monkeypatch):
    """Products of seven rows of 40, where a stream this short would fit into one."""
    monkeypatch.setattr(moments, "_CHUNK_BYTES", 7 * 40 * 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("rank", "exact_bytes"), [(40, 2**30), (11, 0)], ids=["exact", "sketch"])
def test_many_chunks_have_the_moments_of_all(rank, exact_bytes):
    """A sketch of 2 rank + 16 columns is exact for 39 samples, which span 38 directions."""
    x = samples(39, (40,), shift=100.0)
    gaussian = fit_gaussian(x.split(5), rank=rank, exact_bytes=exact_bytes)
    mean, expected = moments_of(x)
    torch.testing.assert_close(gaussian.mean, mean, rtol=1e-12, atol=1e-12)
    values = torch.linalg.eigvalsh(expected).flip(0)[: min(rank, 38)]
    torch.testing.assert_close(gaussian.variances, values, rtol=1e-9, atol=1e-9)
    assert gaussian.fit.total_variance == pytest.approx(float(expected.trace()), rel=1e-12)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "sketch"])
def test_order_and_batches_do_not_matter(exact):
    x = samples(300, (40,))
    options = {"rank": 5, "exact_bytes": 2**30 if exact else 0}
    one = fit_gaussian([x], **options)
    shuffled = x[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    other = fit_gaussian(shuffled.split(11), **options)
    torch.testing.assert_close(other.mean, one.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance(other), covariance(one), rtol=1e-9, atol=1e-9)
    assert other.fit.left_out == pytest.approx(one.fit.left_out, abs=1e-10)


def test_streams_merge_into_one():
    x = samples(50, (6,), shift=100.0)
    parts = [Fitter((6,), 6) for _ in range(2)]
    for part, rows in zip(parts, x.split(20), strict=False):
        part.add(rows)
    parts[0].moments[0].merge(parts[1].moments[0])
    _, expected = moments_of(x[:40])
    torch.testing.assert_close(
        covariance(parts[0].gaussians()[0]), expected, rtol=1e-11, atol=1e-11
    )


def test_krylov_spaces_find_the_leading_eigenpairs_of_a_large_matrix():
    generator = torch.Generator().manual_seed(0)
    d = 1100
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -1.2
    found = principal_of_matrix(vectors * values @ vectors.T, 12)
    torch.testing.assert_close(found.values, values[:12], rtol=1e-12, atol=1e-12)
    overlap = (found.vectors * vectors[:, :12]).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=1e-9, atol=1e-9)


def test_a_sketch_says_by_how_much_it_is_off():
    """The Nystrom approximation is below the matrix, so that its trace error is known."""
    generator = torch.Generator().manual_seed(0)
    d, rank = 200, 10
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -2.0
    matrix = vectors * values @ vectors.T
    omega = sketching_matrix(d, 2 * rank + 16, seed=1)
    found = principal_of_sketch(matrix @ omega, omega, rank)
    assert (found.values <= values[:rank] + 1e-12).all()
    assert (found.values[:5] > 0.97 * values[:5]).all()
    assert 0 < float(values.sum()) - found.seen < 0.05 * float(values.sum())


def test_a_sketch_of_few_samples_is_exact():
    x = samples(20, (60,))
    gaussian = fit_gaussian(x.split(6), rank=8, exact_bytes=0)
    values = torch.linalg.eigvalsh(moments_of(x)[1]).flip(0)
    torch.testing.assert_close(gaussian.variances, values[:8], rtol=1e-9, atol=1e-9)
    assert gaussian.fit.sketch_error == 0.0


def test_a_sketch_of_many_samples_reports_its_error():
    gaussian = fit_gaussian([samples(500, (60,))], rank=8, exact_bytes=0)
    values = torch.linalg.eigvalsh(moments_of(samples(500, (60,)))[1]).flip(0)
    missed = gaussian.fit.sketch_error
    assert 0 < missed < 0.6
    assert (gaussian.variances <= values[:8] + 1e-9).all()
    total = float(gaussian.variances.sum()) + gaussian.floor * (60 - 8)
    assert total == pytest.approx(float(values.sum()))  # the floor takes the rest, exactly


def test_a_fit_by_class_has_each_classes_moments_and_share():
    x, labels = samples(90), torch.arange(90) % 3
    labels[:10] = 0
    mixture = fit_gaussian(zip(x.split(8), labels.split(8), strict=True), rank=10, classes=3)
    assert mixture.by_class
    for k in range(3):
        mean, expected = moments_of(x[labels == k])
        torch.testing.assert_close(mixture[k].mean.flatten(), mean)
        torch.testing.assert_close(covariance(mixture[k]), expected, rtol=1e-9, atol=1e-9)
    shares = torch.bincount(labels).double() / 90
    torch.testing.assert_close(mixture.log_weights.exp(), shares)


def test_clusters_that_are_apart_are_told_apart():
    x = torch.cat([samples(40, (3,), seed=k, shift=100.0 * k) for k in range(3)])
    centres = cluster_centres(x, 3)
    mixture = fit_gaussian(x.split(7), rank=3, centres=centres)
    assert not mixture.by_class
    assert sorted(mixture[k].fit.samples for k in range(3)) == [40, 40, 40]
    found = sorted(float(mixture[k].mean.mean()) for k in range(3))
    assert found == pytest.approx([0, 100, 200], abs=5)
    with pytest.raises(ValueError, match="as many different samples"):
        cluster_centres(torch.zeros(9, 3), 2)


@pytest.mark.parametrize(("value_range", "factor"), [("unit", 2.0), ("byte", 2 / 255)])
def test_pixels_of_other_ranges_are_converted_to_signed_ones(value_range, factor):
    raw = torch.rand(50, 3, 2, generator=torch.Generator().manual_seed(0)) * (2 / factor)
    converted = raw.double() * factor - 1
    found = fit_gaussian([raw], rank=6, value_range=value_range)
    expected = fit_gaussian([converted], rank=6, value_range="signed")
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(covariance(found), covariance(expected), rtol=1e-9, atol=1e-9)
    assert found.fit.total_variance == pytest.approx(expected.fit.total_variance)
    assert "to [-1, 1]" in found.fit.scaling


def test_pixels_of_another_range_than_was_said_are_refused():
    unit = torch.rand(50, 4)
    with pytest.raises(ValueError, match="'signed' pixels do not: set value_range to 'unit'"):
        fit_gaussian([unit], rank=2, value_range="signed")
    with pytest.raises(ValueError, match="'byte' pixels do not: set value_range to 'unit'"):
        fit_gaussian([unit], rank=2, value_range="byte")
    with pytest.raises(ValueError, match="value_range 'unit' is 0 to 1"):
        fit_gaussian([unit * 2 - 1], rank=2, value_range="unit")


def test_constant_samples_are_a_point():
    gaussian = fit_gaussian([torch.full((9, 4), 0.3)], rank=3)
    assert gaussian.rank == 0
    assert gaussian.floor == 0
    found = gaussian.denoise(torch.randn(2, 4), 1.0, 2.0)
    torch.testing.assert_close(found, torch.full((2, 4), 0.3))


def test_a_constant_pixel_has_no_variance():
    x = samples(50, (5,))
    x[:, 2] = 0.7
    gaussian = fit_gaussian([x], rank=5)
    assert gaussian.rank == 4
    assert covariance(gaussian)[2].abs().max() < 1e-12
    assert gaussian.mean[2] == pytest.approx(0.7)


@pytest.mark.parametrize("exact_bytes", [2**30, 0])
def test_fewer_samples_than_directions_give_as_many_as_they_span(exact_bytes):
    x = samples(5, (80,))
    gaussian = fit_gaussian([x], rank=20, exact_bytes=exact_bytes)
    assert gaussian.rank == 4
    assert gaussian.floor == 0
    torch.testing.assert_close(covariance(gaussian), moments_of(x)[1], rtol=1e-8, atol=1e-8)


def test_rank_0_is_the_isotropic_gaussian():
    x = samples()
    gaussian = fit_gaussian([x], rank=0)
    assert gaussian.basis.shape == (10, 0)
    assert gaussian.floor == pytest.approx(float(moments_of(x)[1].trace()) / 10)


def test_what_cannot_be_fitted_is_said():
    x = samples()
    with pytest.raises(ValueError, match="there are 1 samples; a variance needs two"):
        fit_gaussian([x[:1]], rank=1)
    with pytest.raises(ValueError, match="no samples"):
        fit_gaussian([], rank=1)
    with pytest.raises(ValueError, match="component 1 has 0 samples"):
        fit_gaussian([(x, torch.zeros(60, dtype=torch.long))], rank=1, classes=2)
    with pytest.raises(ValueError, match="needs the label"):
        fit_gaussian([x], rank=1, classes=2)
    with pytest.raises(ValueError, match="rank is 11; expected 0 to 10"):
        fit_gaussian([x], rank=11)
    with pytest.raises(ValueError, match=r"expected \[2, 5\]"):
        fit_gaussian([x, x.flatten(1)], rank=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_number(value):
    x = samples()
    x[17, 1, 2] = value
    with pytest.raises(ValueError, match=r"1 of 60 samples hold nan or infinite .* number 17"):
        fit_gaussian([x], rank=2)
