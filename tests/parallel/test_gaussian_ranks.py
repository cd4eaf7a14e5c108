"""A Gaussian fitted by several ranks is the one that a single rank fits."""

from __future__ import annotations

import pytest
import torch
from processes import run_ranks

from fastdistill.gaussian import fit_gaussian
from fastdistill.parallel import Ranks


def samples():
    """Correlated samples with a mean far from 0."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    return torch.randn(300, 40, generator=generator, dtype=torch.float64) @ mix + 3


def covariance(gaussian):
    rest = torch.eye(40, dtype=torch.float64) - gaussian.basis @ gaussian.basis.T
    return gaussian.basis * gaussian.variances @ gaussian.basis.T + gaussian.floor * rest


RANK_CASES = [(2**30, False), (0, False), (2**30, True)]
"""Exact and sketched, and exact by class."""


def fits_on_ranks(ranks):
    """Each rank fits its share of the samples; what they then hold, in each of the cases."""
    x, labels = samples(), torch.arange(300) % 3
    own = slice(ranks.rank, None, ranks.size)
    found = []
    for exact_bytes, by_class in RANK_CASES:
        batches = zip(x[own].split(13), labels[own].split(13), strict=True)
        result = fit_gaussian(
            batches,
            rank=5,
            group=ranks.control,
            exact_bytes=exact_bytes,
            classes=3 if by_class else 0,
        )
        parts = [result[k] for k in range(3)] if by_class else [result]
        found += [(one.mean, one.variances, covariance(one), one.fit.samples) for one in parts]
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_fit_what_one_would(size):
    alone = fits_on_ranks(Ranks())
    for found in run_ranks(size, fits_on_ranks):
        for mine, expected in zip(found, alone, strict=True):
            for tensor, whole in zip(mine[:3], expected[:3], strict=True):
                torch.testing.assert_close(tensor, whole, rtol=1e-9, atol=1e-9)
            assert mine[3] == expected[3]
