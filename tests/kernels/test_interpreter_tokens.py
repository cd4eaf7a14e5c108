"""Triton kernels on tokens and heads, in the interpreter, against their references.

Bounds are those of `test_interpreter`; sums over tokens have a float32 reference of their own.
"""

from __future__ import annotations

import pytest
import torch
from test_interpreter import BF16, F32, assert_accurate

from fastdistill.kernels import _rows
from fastdistill.ops.gated_residual import _gated_residual, _gated_residual_backward
from fastdistill.ops.modulated_norm import _modulated_norm, _modulated_norm_backward
from fastdistill.ops.rms_norm_rope import _rms_norm_rope, _rms_norm_rope_backward

# Samples, tokens, channels: a ragged last program of tokens, odd channels, one token.
SHAPES = ((1, 18, 40), (2, 17, 7), (2, 1, 72))
DTYPES = (F32, BF16)


def chunks(batch: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(gate, scale, shift) whose samples lie apart."""
    return (0.5 * torch.randn(batch, 6 * channels)).to(dtype).chunk(6, dim=1)[1:4]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "channels"), SHAPES)
@pytest.mark.parametrize("form", ["modulated", "gated", "affine", "plain residual"])
def test_modulated_norm(form, batch, tokens, channels, dtype):
    # Sums x + gate * h that bfloat16 holds, since the interpreter truncates where others round.
    x, h = (torch.randint(-8, 9, (batch, tokens, channels)).to(dtype) / 2 for _ in range(2))
    u, v = (torch.randn(batch, tokens, channels).to(dtype) for _ in range(2))
    gate, factor, offset = chunks(batch, channels, dtype)
    gate = torch.where(gate > 0, 0.5, -2.0).to(dtype)
    if form == "affine":
        factor, offset = factor[0].clone(), offset[0].clone()
    residual = None if form == "modulated" else h
    given = gate if form == "gated" else None
    plus_one = form != "affine"
    total, _, mean, rstd = assert_accurate(
        *(_modulated_norm, x, residual, given, factor, offset, plus_one, 1e-6)
    )
    value = total if form in ("affine", "plain residual") else x
    kept, grad_sum = (h if form == "gated" else None), (None if residual is None else v)
    # Sums of 18 tokens at most: torch adds them in another order.
    assert_accurate(
        *(_modulated_norm_backward, value, kept, given, factor, mean, rstd, grad_sum, u),
        *(plus_one, form != "plain residual"),
        slack=1e-5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "channels"), SHAPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_gated_residual(frozen, batch, tokens, channels, dtype):
    x, h, u = (torch.randn(batch, tokens, channels).to(dtype) for _ in range(3))
    gate = chunks(batch, channels, dtype)[0]
    (y,) = assert_accurate(_One(_gated_residual), x, h, gate)
    assert y.shape == x.shape
    kept = None if frozen else h
    assert_accurate(_gated_residual_backward, u, gate, kept, slack=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize(("heads", "channels"), [(3, 64), (2, 72), (5, 12)])
def test_rms_norm_rope(heads, channels, two, rotary, dtype):
    x, text, u = (torch.randn(2, t, heads, channels).to(dtype) for t in (13, 5, 18))
    weights = [torch.randn(channels).to(dtype) for _ in range(2)]
    second = (text, weights[1]) if two else (None, None)
    u = u if two else u[:, :13].contiguous()
    angles = [torch.randn(u.shape[1], channels) if rotary else None for _ in range(2)]
    given = (x, weights[0], *second, *angles, 1e-6)
    assert_accurate(_One(_rms_norm_rope), *given)
    assert_accurate(_rms_norm_rope_backward, u, *given, slack=2e-5)


class _One:
    """An op of one result as one of several, which `assert_accurate` expects."""

    def __init__(self, op):
        self._op = op

    def __call__(self, *args):
        return (self._op(*args),)

    def reference(self, *args):
        return (self._op.reference(*args),)


def test_an_empty_batch_gives_empty_gradients_and_zero_sums():
    x, channel = torch.zeros(0, 3, 8), torch.zeros(0, 8)
    weight = torch.ones(8)
    (dx, _, _, dweight, dbias) = assert_accurate(
        *(_modulated_norm_backward, x, None, None, weight, x[:, :, 0], x[:, :, 0], None, x),
        *(False, True),
    )
    assert dx.shape == x.shape
    assert dweight.equal(torch.zeros(8))
    assert dbias.equal(torch.zeros(8))
    assert_accurate(_One(_gated_residual), x, x, channel)
    heads = torch.zeros(0, 3, 2, 4)
    _, dweight, _, _ = assert_accurate(
        _rms_norm_rope_backward, heads, heads, weight[:4], None, None, None, None, 1e-6
    )
    assert dweight.equal(torch.zeros(4))


def test_programs_sum_more_tokens_where_there_are_more():
    sizes = [
        _rows.tokens_a_program(batch, tokens) for batch, tokens in ((1, 64), (8, 4096), (64, 4096))
    ]
    assert sizes == [16, 32, 64]
