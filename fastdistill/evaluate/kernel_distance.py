"""Kernel distance: the unbiased squared MMD between two sets ("KID" of Inception features).

Binkowski et al. 2018, "Demystifying MMD GANs" (arXiv 1801.01401), section 4, with the kernel
k(x, y) = (x . y / d + 1)^3; the estimator is Gretton et al. 2012, equation 3:

    sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (n (n - 1))
        - 2 sum_{i, j} k(x_i, y_j) / (m n)

Its mean over random subsets has no bias at any number of samples, and may be negative where the
sets are alike: the spread over the subsets says how far from zero that may be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.evaluate._arguments import check_features, check_same_width, random_rows
from fastdistill.evaluate._threads import SMALL_WIDTH, one_thread


class KernelDistance(NamedTuple):
    """Result of `kernel_distance`."""

    mean: float
    """Mean over the subsets"""
    deviation: float
    """Standard deviation over the subsets"""


def kernel_distance(
    real: Tensor,
    generated: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    degree: int = 3,
    seed: int = 0,
) -> KernelDistance:
    """Unbiased squared MMD with the polynomial kernel, averaged over random subsets.

    Args:
        real: floating-point features [n, d].
        generated: floating-point features [m, d].
        subsets: number of random pairs of subsets.
        subset_size: samples of each; min(n, m) where that is less.
        degree: of the polynomial.
        seed: of a generator of its own; torch's global one is neither read nor moved.

    Raises:
        ValueError: fewer than two samples, no subset, different d, or non-finite features.
    """
    check_features("real", real, rows=2)
    check_features("generated", generated, rows=2)
    check_same_width(real, generated)
    if subsets < 1 or subset_size < 2 or degree < 1:
        raise ValueError(
            f"subsets is {subsets}, subset_size {subset_size} and degree {degree}; expected at "
            "least 1, 2 and 1"
        )
    size = min(subset_size, len(real), len(generated))
    generator = torch.Generator("cpu").manual_seed(seed)
    with one_thread(when=real.shape[1] <= SMALL_WIDTH):
        values = torch.stack(
            [
                _polynomial_mmd(
                    random_rows(real, size, generator).double(),
                    random_rows(generated, size, generator).double().to(real.device),
                    degree,
                )
                for _ in range(subsets)
            ]
        )
    return KernelDistance(float(values.mean()), float(values.std(correction=0)))


def _polynomial_mmd(x: Tensor, y: Tensor, degree: int) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** degree

    return unbiased_mmd(kernel(x, x), kernel(y, y), kernel(x, y))


def unbiased_mmd(within_x: Tensor, within_y: Tensor, between: Tensor) -> Tensor:
    """Squared MMD from kernel matrices [n, n], [m, m] and [n, m]; a scalar."""

    def mean_of_pairs(kernel: Tensor) -> Tensor:
        n = len(kernel)
        return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))

    return mean_of_pairs(within_x) + mean_of_pairs(within_y) - 2 * between.mean()
