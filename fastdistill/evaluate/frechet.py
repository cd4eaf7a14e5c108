"""Frechet distance between two sets of features, and the yardstick to read it by.

The squared 2-Wasserstein distance between the Gaussians with the same first two moments (Dowson
and Landau 1982; as "FID" in Heusel et al. 2017, arXiv 1706.08500, equation 6):

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2})

With S_i = L_i L_i^T, the last trace is the sum of the singular values of L_1^T L_2: these are the
square roots of the eigenvalues of S_1^{1/2} S_2 S_1^{1/2}. Computed as singular values they carry
an error of eps |S| for singular covariances too, where a root of a computed eigenvalue carries
sqrt(eps) |S| for each direction without variance.

The distance of finite samples is biased upwards, by about the same amount for two sets of the same
sizes. So a number means something only beside the number that two sets of *real* samples of the
same size have: `real_split_distance`, to be compared with `matched_frechet_distance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.evaluate._arguments import check_features, check_same_width, random_rows
from fastdistill.evaluate._threads import SMALL_WIDTH, one_thread

ROWS_AT_ONCE = 8192


class GaussianStatistics(NamedTuple):
    """First two moments of a set of features."""

    mean: Tensor
    """Mean  # [d], float64"""
    covariance: Tensor
    """Unbiased covariance, divided by count - 1  # [d, d], float64"""
    count: int  # type: ignore[assignment]  # in place of tuple.count
    """Number of samples behind the two"""


def gaussian_statistics(features: Tensor | Iterable[Tensor]) -> GaussianStatistics:
    """Mean and unbiased covariance in one pass, in float64 whatever the storage.

    Batches are merged by Chan, Golub and LeVeque's update of centred moments (1983, equation 1.5),
    which does not cancel where the mean is large beside the deviation.

    Args:
        features: floating-point features [n, d], or an iterable of batches [n_i, d] that is read
            once, so that the features never need to be in memory together.

    Returns:
        Moments on the device of the (first) features.

    Raises:
        ValueError: fewer than two samples in all, non-finite features, or batches of different d.
    """
    batches = [features] if isinstance(features, Tensor) else features
    merged: GaussianStatistics | None = None
    for batch in batches:
        check_features("features", batch, rows=0)
        if merged is not None:
            check_same_width(merged.mean[None], batch)
        for rows in batch.detach().split(ROWS_AT_ONCE):
            if rows.shape[0] > 0:
                with one_thread(when=rows.shape[1] <= SMALL_WIDTH):
                    merged = _merge(merged, rows.to(torch.float64))
    if merged is None or merged.count < 2:
        count = 0 if merged is None else merged.count
        raise ValueError(f"features have {count} samples; a covariance needs at least 2")
    return merged._replace(covariance=merged.covariance / (merged.count - 1))


def feature_statistics(
    batches: Iterable[Tensor], features: Callable[[Tensor], Tensor]
) -> GaussianStatistics:
    """Moments of any extractor's features, for `frechet_distance`.

    Of Inception's pool features the distance is the FID, of CLIP's or DINO's what papers call after
    them; the weights are the caller's.

    Args:
        batches: samples, a batch at a time; read once.
        features: the extractor: samples [n, ...] to floating-point features [n, d], or [n, ...]
            that is flattened.

    Raises:
        ValueError: as `gaussian_statistics`.
    """
    with torch.no_grad():
        return gaussian_statistics(features(batch).flatten(1) for batch in batches)


def _merge(merged: GaussianStatistics | None, rows: Tensor) -> GaussianStatistics:
    """Add rows [n, d] to moments whose ``covariance`` is still the undivided sum of products."""
    mean = rows.mean(0)  # [d]
    centred = rows - mean
    scatter = centred.T @ centred  # [d, d]
    if merged is None:
        return GaussianStatistics(mean, scatter, rows.shape[0])
    count = merged.count + rows.shape[0]
    step = mean.to(merged.mean.device) - merged.mean
    between = torch.outer(step, step) * (merged.count * rows.shape[0] / count)
    return GaussianStatistics(
        merged.mean + step * (rows.shape[0] / count),
        merged.covariance + scatter.to(step.device) + between,
        count,
    )


def frechet_distance(
    features_a: Tensor | GaussianStatistics, features_b: Tensor | GaussianStatistics
) -> float:
    """Frechet distance between the Gaussians fitted to two sets (see the module's docstring).

    Symmetric, zero for equal moments, exact up to float64 rounding for singular covariances.
    Costs two eigendecompositions and the singular values of a d x d matrix.

    Args:
        features_a: floating-point features [n, d], or their moments.
        features_b: floating-point features [m, d], or their moments.

    Returns:
        The squared Wasserstein distance, in squared units of the features.

    Raises:
        ValueError: fewer than two samples, anything non-finite, different d, or a covariance that
            is not symmetric positive semi-definite.
    """
    a, b = (
        gaussian_statistics(value) if isinstance(value, Tensor) else _checked(value)
        for value in (features_a, features_b)
    )
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features have {a.mean.shape[0]} and {b.mean.shape[0]} dimensions; expected equal"
        )
    b = b._replace(mean=b.mean.to(a.mean.device), covariance=b.covariance.to(a.mean.device))
    with one_thread(when=a.mean.shape[0] <= SMALL_WIDTH):
        return _distance(a, b)


def _distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    factor_a, factor_b = _factor(a.covariance), _factor(b.covariance)
    shift = (a.mean - b.mean).square().sum()
    shared = torch.linalg.svdvals(factor_a.T @ factor_b).sum()  # tr (S_a S_b)^{1/2}
    spread = factor_a.square().sum() + factor_b.square().sum() - 2.0 * shared
    return float((shift + spread).clamp_min(0.0))


def _checked(statistics: GaussianStatistics) -> GaussianStatistics:
    """The same moments in float64, after checks of shape, finiteness and symmetry."""
    mean, covariance = (value.detach().double() for value in statistics[:2])
    if mean.ndim != 1 or covariance.shape != (mean.shape[0], mean.shape[0]):
        raise ValueError(
            f"mean and covariance have shapes {tuple(mean.shape)} and {tuple(covariance.shape)}; "
            "expected [d] and [d, d]"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("mean or covariance is not finite")
    if (covariance - covariance.T).abs().max() > 1e-6 * covariance.abs().max():
        raise ValueError("covariance is not symmetric")
    return GaussianStatistics(mean, covariance, statistics.count)


def _factor(covariance: Tensor) -> Tensor:
    """L with covariance = L L^T, for a positive semi-definite float64 covariance [d, d]."""
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -1e-6 * values[-1].abs():
        raise ValueError(
            f"covariance has the negative eigenvalue {float(values[0]):.3g} (largest "
            f"{float(values[-1]):.3g}); expected a positive semi-definite matrix"
        )
    return vectors * values.clamp_min(0.0).sqrt()


def real_split_distance(
    features: Tensor, splits: int = 8, seed: int = 0, size: int | None = None
) -> float:
    """Mean Frechet distance between two disjoint random parts of the same real features.

    What a generator that draws from the data's own distribution would score at this sample size:
    compare it with `matched_frechet_distance`.

    Args:
        features: floating-point features [n, d] of real samples.
        splits: number of random splits to average over.
        seed: of a generator of its own; torch's global one is neither read nor moved.
        size: samples in each part; half of them by default.

    Returns:
        The mean over the splits, in squared units of the features.

    Raises:
        ValueError: fewer than four samples, ``size`` not in 2..n/2, ``splits`` < 1, or non-finite
            features.
    """
    check_features("features", features, rows=4)
    half = features.shape[0] // 2
    size = _split_size(half if size is None else size, half, splits)
    generator = torch.Generator("cpu").manual_seed(seed)
    total = 0.0
    with one_thread(when=features.shape[1] <= SMALL_WIDTH):
        for _ in range(splits):
            parts = random_rows(features, 2 * size, generator)
            total += frechet_distance(parts[:size], parts[size:])
    return total / splits


def matched_frechet_distance(
    real: Tensor, generated: Tensor, splits: int = 8, seed: int = 0, size: int | None = None
) -> float:
    """Mean Frechet distance between random parts of ``real`` and ``generated`` of equal size.

    Of the size that `real_split_distance` takes, so that a perfect generator scores the same as two
    real parts. (The distance between the whole sets has less bias, and would flatter it.) Generated
    samples that are copies of the real ones score below two real parts.

    Args:
        real: floating-point features [n, d].
        generated: floating-point features [m, d].
        splits: number of random pairs of parts to average over.
        seed: of a generator of its own; torch's global one is neither read nor moved.
        size: samples in each part; min(n // 2, m) by default.

    Returns:
        The mean over the pairs, in squared units of the features.

    Raises:
        ValueError: ``size`` not in 2..min(n // 2, m), ``splits`` < 1, different d, or non-finite
            features.
    """
    check_features("real", real, rows=4)
    check_features("generated", generated, rows=2)
    largest = min(real.shape[0] // 2, generated.shape[0])
    size = _split_size(largest if size is None else size, largest, splits)
    generator = torch.Generator("cpu").manual_seed(seed)
    total = 0.0
    with one_thread(when=real.shape[1] <= SMALL_WIDTH):
        for _ in range(splits):
            part = random_rows(real, size, generator)
            total += frechet_distance(part, random_rows(generated, size, generator))
    return total / splits


def _split_size(size: int, largest: int, splits: int) -> int:
    if splits < 1:
        raise ValueError(f"splits is {splits}; expected at least 1")
    if not 2 <= size <= largest:
        raise ValueError(f"size is {size}; expected 2 to {largest} samples in each part")
    return size
