"""Wasserstein distances of order two between sets of samples of one size.

    W_2^2 = min over matchings pi of mean_i |x_i - y_pi(i)|^2

exactly by an assignment (n^3 work: for small sets), or sliced: the mean over random directions of
the distance of the projections, which sorting gives (Bonneel et al. 2015). Two sets of one law are
some way apart, n^(-1/d) of their width for the exact distance: compare with what fresh samples of
the truth score at the same n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.evaluate._arguments import check_features, check_same_width


def wasserstein(a: Tensor, b: Tensor) -> float:
    """W_2 between two sets, exactly.

    Args:
        a: floating-point samples [n, d].
        b: floating-point samples [n, d].

    Raises:
        ValueError: for sets of different sizes or widths, empty or not finite.
    """
    _check(a, b)
    from scipy.optimize import linear_sum_assignment

    squared = torch.cdist(a.double(), b.double()).square().cpu().numpy()
    rows, columns = linear_sum_assignment(squared)
    return float(squared[rows, columns].mean() ** 0.5)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 200, seed: int = 0) -> float:
    """Root mean square over random directions of W_2 between the projections.

    Args:
        a: floating-point samples [n, d].
        b: floating-point samples [n, d].
        directions: number of random directions.
        seed: of a generator of its own; torch's global one is neither read nor moved.

    Raises:
        ValueError: for sets of different sizes or widths, empty or not finite, or no direction.
    """
    _check(a, b)
    if directions < 1:
        raise ValueError(f"directions is {directions}; expected at least 1")
    generator = torch.Generator("cpu").manual_seed(seed)
    normals = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64)
    axes = (normals / normals.norm(dim=0)).to(a.device)
    sorted_a, sorted_b = ((value.double() @ axes).sort(dim=0).values for value in (a, b))
    return float((sorted_a - sorted_b).square().mean().sqrt())


def _check(a: Tensor, b: Tensor) -> None:
    check_features("a", a, rows=1)
    check_features("b", b, rows=1)
    check_same_width(a, b)
    if len(a) != len(b):
        raise ValueError(f"sets of {len(a)} and {len(b)} samples; expected one size")
