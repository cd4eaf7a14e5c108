"""RMS norm of queries and keys with rotary angles: tiles of heads, one pass, both ways.

A program takes a tile of rows, the heads of some tokens of one sample, and each stream of joint
attention has a launch of its own that writes into its part of the joint tokens. Partial sums for
the weights, one row a program, are added by torch.

Bytes moved: forward x and y once; backward the gradient, x and dx once; cosines and sines once for
all heads of a token, from the cache for the other samples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import check_storage, on_device_of

_TILE = 4_096  # 16 numbers a thread in 8 warps


@triton.jit
def _locate(rows, tokens, joint, start, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Rows of this program in x and in the joint tokens, their tokens there, which exist."""
    programs = tl.cdiv(rows, ROWS)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * ROWS
    lane = tl.arange(0, ROWS)
    own = sample * rows + first
    theirs = sample * joint + start * HEADS + first
    return own, theirs, lane, start + (first + lane) // HEADS, first + lane < rows


@triton.jit
def _pairs(value, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Even and odd channels of a tile [ROWS, 2 HALF]."""
    return tl.split(value.reshape([ROWS, HALF, 2]))


@triton.jit
def _joined(even, odd, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The tile of even and odd channels."""
    return tl.join(even, odd).reshape([ROWS, 2 * HALF])


@triton.jit
def _tile(pointer, row, channel, mask):
    """A tile of rows from its first one on, float32."""
    return tl.load(pointer + row + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "start"])
def _rms_norm_rope_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    rows,
    tokens,
    joint,
    start,
    eps,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # n = x / sqrt(mean(x^2) + eps) * weight
    # y = n cos + (-n_odd, n_even) sin
    own, theirs, lane, token, real = _locate(rows, tokens, joint, start, ROWS, HEADS)
    channel = tl.arange(0, BLOCK)
    exists = real[:, None] & (channel < CHANNELS)[None, :]
    offset = lane[:, None] * CHANNELS + channel[None, :]
    x = _tile(x_ptr, own * CHANNELS, offset, exists)
    weight = tl.load(weight_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / CHANNELS + eps)
    y = x * rstd[:, None] * weight[None, :]
    if cos_ptr is not None:
        angle = token[:, None] * CHANNELS + channel[None, :]
        c0, c1 = _pairs(_tile(cos_ptr, 0, angle, exists), ROWS, BLOCK // 2)
        s0, s1 = _pairs(_tile(sin_ptr, 0, angle, exists), ROWS, BLOCK // 2)
        even, odd = _pairs(y, ROWS, BLOCK // 2)
        y = _joined(even * c0 - odd * s0, odd * c1 + even * s1, ROWS, BLOCK // 2)
    tl.store(y_ptr + theirs * CHANNELS + offset, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["tokens", "start"])
def _rms_norm_rope_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    dweight_ptr,
    rows,
    tokens,
    joint,
    start,
    eps,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # u = dL/dn, turned back by the angles,   w = u weight,   n = x / sqrt(...)
    # dx = (w - n mean(w n)) / sqrt(...),   dweight = sum u n over the rows of this program
    own, theirs, lane, token, real = _locate(rows, tokens, joint, start, ROWS, HEADS)
    channel = tl.arange(0, BLOCK)
    exists = real[:, None] & (channel < CHANNELS)[None, :]
    offset = lane[:, None] * CHANNELS + channel[None, :]
    u = _tile(grad_ptr, theirs * CHANNELS, offset, exists)
    x = _tile(x_ptr, own * CHANNELS, offset, exists)
    weight = tl.load(weight_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        angle = token[:, None] * CHANNELS + channel[None, :]
        c0, c1 = _pairs(_tile(cos_ptr, 0, angle, exists), ROWS, BLOCK // 2)
        s0, s1 = _pairs(_tile(sin_ptr, 0, angle, exists), ROWS, BLOCK // 2)
        even, odd = _pairs(u, ROWS, BLOCK // 2)
        u = _joined(even * c0 + odd * s1, odd * c1 - even * s0, ROWS, BLOCK // 2)
    rstd = (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / CHANNELS + eps))[:, None]
    n, w = x * rstd, u * weight[None, :]
    dx = rstd * (w - n * (tl.sum(w * n, axis=1) / CHANNELS)[:, None])
    tl.store(dx_ptr + own * CHANNELS + offset, dx.to(dx_ptr.dtype.element_ty), mask=exists)
    share = dweight_ptr + tl.program_id(0).to(tl.int64) * CHANNELS + channel
    tl.store(share, tl.sum(u * n, axis=0), mask=channel < CHANNELS)


def _cut(x: torch.Tensor) -> tuple[int, dict[str, int | bool]]:
    """Programs of a stream, and the constants of its kernels."""
    batch, tokens, heads, channels = x.shape
    block = max(16, triton.next_power_of_2(channels))
    if block > _TILE:
        raise ValueError(f"heads have {channels} channels; kernels take {_TILE}")
    constants = {"HEADS": heads, "CHANNELS": channels, "BLOCK": block, "ROWS": _TILE // block}
    programs = batch * triton.cdiv(tokens * heads, _TILE // block)
    return programs, {**constants, "num_warps": 8, "enable_fp_fusion": True}


def _streams(
    x: torch.Tensor, second: torch.Tensor | None, joint: torch.Tensor
) -> list[tuple[int, torch.Tensor, tuple[int, int, int, int]]]:
    """Number, tokens, and (rows, tokens, rows of joint, first joint token) of the streams."""
    found, start = [], 0
    for number, value in enumerate((x, second)):
        if value is not None and value.numel() > 0:
            rows, whole = (v.shape[1] * v.shape[2] for v in (value, joint))
            found.append((number, value, (rows, value.shape[1], whole, start)))
        start += x.shape[1]
    return found


def rms_norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    second: torch.Tensor | None,
    second_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Launch `fastdistill::rms_norm_rope`, as `fastdistill.ops.rms_norm_rope`."""
    check_storage(x=x, weight=weight, second=second, second_weight=second_weight, cos=cos, sin=sin)
    tokens = x.shape[1] + (0 if second is None else second.shape[1])
    y = x.new_empty(x.shape[0], tokens, *x.shape[2:])
    weights = (weight, second_weight)
    with on_device_of(x):
        for number, value, places in _streams(x, second, y):
            programs, options = _cut(value)
            _rms_norm_rope_kernel[(programs,)](
                value, weights[number], cos, sin, y, *places, float(eps), **options
            )
    return y


def rms_norm_rope_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    second: torch.Tensor | None,
    second_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::rms_norm_rope_backward`, the gradients of `rms_norm_rope`."""
    check_storage(grad=grad, x=x, weight=weight, second=second, second_weight=second_weight)
    weights = (weight, second_weight)
    found: list[torch.Tensor] = []
    for value, scale in zip((x, second), weights, strict=True):
        found += [x.new_zeros(0) if v is None else torch.zeros_like(v) for v in (value, scale)]
    with on_device_of(x):
        for number, value, places in _streams(x, second, grad):
            programs, options = _cut(value)
            dx = torch.empty_like(value)
            partial = value.new_empty(programs, value.shape[3], dtype=torch.float32)
            _rms_norm_rope_backward_kernel[(programs,)](
                *(grad, value, weights[number], cos, sin, dx, partial, *places, float(eps)),
                **options,
            )
            found[2 * number : 2 * number + 2] = dx, partial.sum(dim=0).to(weights[number].dtype)
    return found[0], found[1], found[2], found[3]
