"""Kernels of layers, in the interpreter, against the reference in float64.

Errors may be twice those of the float32 reference plus four ulp of the largest number; results in
bfloat16 get one ulp more, since the interpreter truncates where a GPU rounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.kernels import group_norm
from fastdistill.ops import use_backend
from fastdistill.ops._op import Op
from fastdistill.ops.glu import _geglu, _geglu_backward
from fastdistill.ops.group_norm import _group_norm_silu, _group_norm_silu_backward, laid_out_as

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ULP = {F32: 2.0**-21, BF16: 2.0**-7, F16: 2.0**-10}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_accurate(op: Op, *args: Any) -> tuple[Tensor, ...]:
    """Launch, and compare each result with the reference as the module's docstring says."""
    with use_backend("triton"):
        got = op(*args)
    got = got if isinstance(got, tuple) else (got,)

    def reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = [
            value.to(dtype) if isinstance(value, Tensor) else value for value in args
        ]  # strides are kept
        found = op.reference(*wide)
        return found if isinstance(found, tuple) else (found,)

    for actual, near, true in zip(got, reference(F32), reference(torch.float64), strict=True):
        assert actual.shape == true.shape
        assert actual.stride() == true.stride()
        if true.numel() == 0:
            continue
        bound = 2 * (near - true).abs().max() + ULP[actual.dtype] * true.abs().max()
        assert (actual.double() - true).abs().max() <= bound
    return got


# Halves that a power of two divides, that 64 does not, and one that is narrower than a tile.
@pytest.mark.parametrize("width", [1024, 320, 100, 5])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu(width: int, dtype: torch.dtype, approximate: str) -> None:
    x, grad = torch.randn(2, 3, 2 * width) * 3, torch.randn(2, 3, width)
    (h,) = assert_accurate(_geglu, x.to(dtype), approximate)
    assert h.dtype == dtype
    dx, again = assert_accurate(_geglu_backward, grad.to(dtype), x.to(dtype), approximate, True)
    assert dx.dtype == dtype
    assert torch.equal(again, h)
    assert_accurate(_geglu_backward, grad.to(dtype), x.to(dtype), approximate, False)


def test_geglu_walks_over_more_rows_than_a_tile_has() -> None:
    x, grad = torch.randn(70, 128), torch.randn(70, 64)  # tiles of 32 rows
    assert_accurate(_geglu, x, "none")
    assert_accurate(_geglu_backward, grad, x, "none", True)


SHAPES = [
    (2, 8, 5, 5, 4),  # tails in channels and places
    (1, 4, 66, 66, 2),  # several tiles of places, the last one with a tail
    (2, 24, 4, 4, 8),  # groups of 3 channels, which straddle threads
    (1, 70, 3, 3, 1),  # one group over a channels-last tile and a tail
]


def layer(batch: int, channels: int, *rest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(batch, channels, *rest) * 2 + 3 * torch.randn(channels, *[1] * len(rest))
    return x, torch.randn(batch, channels), torch.randn(channels), torch.randn(channels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shifted", "silu"), [(F32, True, True), (BF16, True, True), (F32, False, False)]
)
def test_group_norm_silu(shape, last: bool, dtype: torch.dtype, shifted: bool, silu: bool) -> None:
    *size, groups = shape
    x, shift, weight, bias = (value.to(dtype) for value in layer(*size))
    x = x.to(memory_format=torch.channels_last) if last else x
    given = shift if shifted else None
    y, mean, rstd = assert_accurate(_group_norm_silu, x, given, weight, bias, groups, 1e-5, silu)
    grad = laid_out_as(torch.randn(size).to(dtype), x)
    rest = (x, given, weight, bias, mean, rstd, groups, silu)
    *_, again = assert_accurate(_group_norm_silu_backward, grad, *rest, True)
    assert torch.equal(again, y)
    assert assert_accurate(_group_norm_silu_backward, grad, *rest, False)[4].numel() == 0


def test_partial_sums_are_added_in_more_than_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm, "_PARTIALS", 8)
    x, shift, weight, bias = layer(1, 8, 80, 80)
    x = x.to(memory_format=torch.channels_last)  # 25 parts of 256 places, 4 channels a group
    y, mean, rstd = assert_accurate(_group_norm_silu, x, shift, weight, bias, 2, 1e-5, True)
    grad = laid_out_as(torch.randn_like(y), x)
    assert_accurate(
        _group_norm_silu_backward, grad, x, shift, weight, bias, mean, rstd, 2, True, True
    )


def test_a_large_mean_costs_the_variance_few_digits() -> None:
    """A naive E[x^2] - E[x]^2 would leave two of seven here."""
    x, _, weight, bias = layer(1, 4, 70, 70)
    with use_backend("triton"):
        _, _, rstd = _group_norm_silu(x + 1000, None, weight, bias, 2, 1e-5, True)
    _, _, true = _group_norm_silu.reference((x + 1000).double(), None, weight, bias, 2, 1e-5, True)
    torch.testing.assert_close(rstd.double(), true, rtol=5e-6, atol=0.0)


def test_sequences_may_have_their_channels_last_too() -> None:
    x, _, weight, bias = layer(2, 32, 12)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_accurate(_group_norm_silu, x, None, weight, bias, 4, 1e-5, False)
