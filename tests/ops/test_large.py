"""Samples of millions of elements, and tensors past 2^31 elements, on the C++ backend."""

from __future__ import annotations

import os

import pytest
import torch
from calls import calls, in_dtype, map_tensors, outcome

from fastdistill.ops import renoise, sum_of_squares, use_backend

OPS = list(calls())
FREE_MEMORY = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1_048_579,), torch.bfloat16), ((4, 1024, 1024), torch.bfloat16), ((2**21,), torch.float32)],
    ids=str,
)
def test_samples_of_millions_of_elements(op, shape, dtype):
    """One to four million elements a sample, one of the sizes odd: as exact as torch.

    Two of them are so large that results are written past the cache.
    """
    if op.name in ("normal", "renoise") and shape[0] == 4:
        pytest.skip("the reference's noise takes seconds; the odd size shows the same")
    args = calls(1, shape, dtype)[op]
    with use_backend("reference"):
        exact = outcome(op, op, in_dtype(args, torch.float64))
        plain = outcome(op, op, map_tensors(torch.clone, args))
    found = outcome(op, op, args)
    for mine, torchs, truth in zip(found, plain, exact, strict=True):
        place = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        error = (mine.double() - truth).abs().max()
        assert error <= 2 * (torchs.double() - truth).abs().max() + place


@pytest.mark.slow
@pytest.mark.skipif(FREE_MEMORY < 11e9, reason="needs 11 GB of free memory")
def test_tensors_past_two_to_the_31_elements():
    """4.3 GB of bfloat16: the last sample is what it is alone, and the last elements count."""
    rows, elements = 2**11 + 1, 2**20
    x0 = torch.zeros(rows, elements, dtype=torch.bfloat16)
    x0[-1, -3:] = 2.0
    assert sum_of_squares(x0) == 12.0
    alpha, sigma = torch.rand(2, rows)
    key, index = torch.tensor([1, 2, 3]), torch.arange(rows)
    whole = renoise(x0, alpha, sigma, key, index).x_t
    alone = renoise(x0[-1:], alpha[-1:], sigma[-1:], key, index[-1:]).x_t
    assert torch.equal(whole[-1:], alone)
