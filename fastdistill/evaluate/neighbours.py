"""Precision, recall, density and coverage by nearest neighbours.

Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models"
(arXiv 1904.06991), equations 1 and 2. The manifold of a set is the union of balls around its
points, each as large as the distance to the point's k-th nearest neighbour in the set:

    precision = share of generated samples inside the manifold of the real ones     (fidelity)
    recall    = share of real samples inside the manifold of the generated ones     (coverage)

Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models" (arXiv
2002.09797), equations 3 and 4, look at the balls of the real samples alone, so that outliers among
the generated ones do not count as coverage, and a ball counts for each sample inside:

    density  = mean number of real balls around a generated sample / k      (fidelity, may pass 1)
    coverage = share of real balls that hold a generated sample             (diversity)

All depend on the number of samples: compare only numbers taken at the same n.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.evaluate._arguments import check_features, check_same_width

DISTANCES_AT_ONCE = 2**24


class PrecisionRecall(NamedTuple):
    """Result of `precision_recall`; both are shares in [0, 1]."""

    precision: float
    """Share of generated samples inside the manifold of the real ones"""
    recall: float
    """Share of real samples inside the manifold of the generated ones"""


class DensityCoverage(NamedTuple):
    """Result of `density_coverage`."""

    density: float
    """Mean number of real balls around a generated sample, divided by k; about 1 for equal laws"""
    coverage: float
    """Share of the real balls that hold a generated sample, in [0, 1]"""


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (see the module's docstring).

    Distances are sums of squared differences, not |x|^2 + |y|^2 - 2 x.y, whose cancellation would
    give repeated samples a distance other than zero. At most ``DISTANCES_AT_ONCE`` of them are in
    memory together.

    Args:
        real: floating-point features [n, d]; computed in float32, or float64 if either set is.
        generated: floating-point features [m, d], on the same device.
        k: which nearest neighbour sets the radius; the paper's choice is 3.

    Returns:
        Precision and recall.

    Raises:
        ValueError: k < 1, k samples or fewer in either set, non-finite features or different d.
    """
    real, generated = _checked(real, generated, k)
    return PrecisionRecall(
        precision=_share_inside(generated, real, _radii(real, k)),
        recall=_share_inside(real, generated, _radii(generated, k)),
    )


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage (see the module's docstring); arguments as `precision_recall`'s.

    Of equal laws and n = m, density is 1 and coverage 1 - (n - 1)...(n - k) / ((2 n - 1)...
    (2 n - k)) on average, which is about 1 - 2^-k (the paper's lemmas 1 and 2).

    Raises:
        ValueError: k < 1, k samples or fewer in either set, non-finite features or different d.
    """
    real, generated = _checked(real, generated, k)
    radii = _radii(real, k)
    around = 0
    held = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for distances in _distances(generated, real):
        inside = distances <= radii
        around += int(inside.sum())
        held |= inside.any(0)
    return DensityCoverage(around / (k * len(generated)), float(held.double().mean()))


def _checked(real: Tensor, generated: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both sets in the dtype that distances are taken in, after checks."""
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    check_features("real", real, rows=k + 1)
    check_features("generated", generated, rows=k + 1)
    check_same_width(real, generated)
    dtype = torch.promote_types(torch.promote_types(real.dtype, generated.dtype), torch.float32)
    return real.detach().to(dtype), generated.detach().to(dtype)


def _distances(queries: Tensor, points: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of some rows of queries [q, d] at a time to all points [n, d]."""
    rows = max(1, DISTANCES_AT_ONCE // points.shape[0])
    for chunk in queries.split(rows):
        yield torch.cdist(chunk, points, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each of the points [n, d] to its k-th nearest *other* point  # [n]."""
    # The nearest of all is the point itself, at exactly zero.
    nearest = [
        distances.topk(k + 1, largest=False).values[:, -1]
        for distances in _distances(points, points)
    ]
    return torch.cat(nearest)


def _share_inside(queries: Tensor, points: Tensor, radii: Tensor) -> float:
    """Share of queries [q, d] in at least one closed ball (points [n, d], radii [n])."""
    inside = [(distances <= radii).any(1) for distances in _distances(queries, points)]
    return float(torch.cat(inside).double().mean())
