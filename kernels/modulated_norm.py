"""Gated residual, layer norm and modulation of tokens: a program a token, one pass.

The backward pass gives each program some tokens of one sample, one after the other, so that the
sums over the tokens stay in registers; partial sums, one row a program, are added by torch.

Bytes moved: forward x and h once, x' and y once; backward x and h (or x') and both gradients once,
dx and dh once, and 3/16 of a float32 row a token or less of partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdistill.kernels._rows import (
    check_row,
    locate_tokens,
    sample_stride,
    store_sum,
    tokens_a_program,
)
from fastdistill.kernels._sample import check_storage, cut, load_block, locate, on_device_of


@triton.jit(do_not_specialize=["tokens"])
def _modulated_norm_kernel(
    x_ptr,
    residual_ptr,
    gate_ptr,
    factor_ptr,
    offset_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    gate_stride,
    factor_stride,
    offset_stride,
    eps,
    PLUS_ONE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # x' = x + g h,   n = (x' - mean) / sqrt(var + eps),   y = n f + o,   f = 1 + scale or weight
    row, _, start, lanes, exists = locate(N, BLOCK, PARTS)
    sample = row // tokens
    x = load_block(x_ptr, start, lanes, exists)
    if residual_ptr is not None:
        h = load_block(residual_ptr, start, lanes, exists)
        if gate_ptr is not None:
            h *= load_block(gate_ptr, sample * gate_stride, lanes, exists)
        rounded = (x + h).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + start + lanes, rounded, mask=exists)
        x = rounded.to(tl.float32)
    mean = tl.sum(x) / N
    centred = tl.where(exists, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / N + eps)
    factor = load_block(factor_ptr, sample * factor_stride, lanes, exists)
    if PLUS_ONE:
        factor += 1.0
    offset = load_block(offset_ptr, sample * offset_stride, lanes, exists)
    y = centred * rstd * factor + offset
    tl.store(y_ptr + start + lanes, y.to(y_ptr.dtype.element_ty), mask=exists)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["tokens"])
def _modulated_norm_backward_kernel(
    x_ptr,
    residual_ptr,
    gate_ptr,
    factor_ptr,
    mean_ptr,
    rstd_ptr,
    grad_sum_ptr,
    grad_y_ptr,
    dx_ptr,
    dh_ptr,
    dgate_ptr,
    dfactor_ptr,
    doffset_ptr,
    tokens,
    gate_stride,
    factor_stride,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # x' = x + g h, or given,   n = (x' - mean) rstd
    # w = u f,   dx = rstd (w - mean(w) - n mean(w n)) + v,   dh = g dx
    # df = sum u n,   do = sum u,   dg = sum h dx,   over the tokens of this program
    sample, first, row, lanes = locate_tokens(tokens, ROWS, BLOCK)
    real = lanes < N
    factor = load_block(factor_ptr, sample * factor_stride, lanes, real)
    if PLUS_ONE:
        factor += 1.0
    if gate_ptr is not None:
        gate = load_block(gate_ptr, sample * gate_stride, lanes, real)
    dgate = tl.zeros([BLOCK], tl.float32)
    dfactor = tl.zeros([BLOCK], tl.float32)
    doffset = tl.zeros([BLOCK], tl.float32)
    for k in range(ROWS):
        exists = real & (first + k < tokens)
        start = (row + k) * N
        mean = tl.load(mean_ptr + row + k, mask=first + k < tokens, other=0.0)
        rstd = tl.load(rstd_ptr + row + k, mask=first + k < tokens, other=0.0)
        x = load_block(x_ptr, start, lanes, exists)
        if residual_ptr is not None:
            h = load_block(residual_ptr, start, lanes, exists)
            x = (x + gate * h).to(x_ptr.dtype.element_ty).to(tl.float32)
        n = tl.where(real, (x - mean) * rstd, 0.0)
        u = load_block(grad_y_ptr, start, lanes, exists)
        if dfactor_ptr is not None:
            dfactor += u * n
            doffset += u
        w = u * factor
        # The order in which ptxas spills nothing on sm_100: one for float16, one for the others.
        if x_ptr.dtype.element_ty == tl.float16:
            along, level = tl.sum(w * n) / N, tl.sum(w) / N
            dx = rstd * (w - level - n * along)
        else:
            dx = rstd * (w - tl.sum(w) / N - n * (tl.sum(w * n) / N))
        if grad_sum_ptr is not None:
            dx += load_block(grad_sum_ptr, start, lanes, exists)
        tl.store(dx_ptr + start + lanes, dx.to(dx_ptr.dtype.element_ty), mask=exists)
        if dgate_ptr is not None:
            dgate += dx * h
        if gate_ptr is not None:
            dh = (gate * dx).to(dh_ptr.dtype.element_ty)
            tl.store(dh_ptr + start + lanes, dh, mask=exists)
    if dfactor_ptr is not None:
        store_sum(dfactor_ptr, dfactor, lanes, N)
        store_sum(doffset_ptr, doffset, lanes, N)
    if dgate_ptr is not None:
        store_sum(dgate_ptr, dgate, lanes, N)


def modulated_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    factor: torch.Tensor,
    offset: torch.Tensor,
    plus_one: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::modulated_norm`, as `fastdistill.ops.modulated_norm`."""
    check_storage(x=x, residual=residual)
    check_storage(factor=factor.dtype, offset=offset.dtype)
    batch, tokens, channels = x.shape
    check_row(channels)
    total, y = (x.new_empty(0) if residual is None else torch.empty_like(x)), torch.empty_like(x)
    mean, rstd = (x.new_empty(batch, tokens, dtype=torch.float32) for _ in range(2))
    if y.numel() == 0:
        return total, y, mean, rstd
    with on_device_of(x):
        _modulated_norm_kernel[(batch * tokens,)](
            *(x, residual, gate, factor, offset, None if residual is None else total, y),
            *(mean, rstd, tokens, *map(sample_stride, (gate, factor, offset)), float(eps)),
            PLUS_ONE=plus_one,
            **cut(channels).options,
        )
    return total, y, mean, rstd


def modulated_norm_backward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    factor: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    grad_sum: torch.Tensor | None,
    grad_y: torch.Tensor,
    plus_one: bool,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::modulated_norm_backward`, the gradients of `modulated_norm`."""
    check_storage(x=x, residual=residual, grad_sum=grad_sum, grad_y=grad_y)
    batch, tokens, channels = x.shape
    nothing, dx = x.new_empty(0), torch.empty_like(x)
    dh = nothing if gate is None else torch.empty_like(x)
    if x.numel() == 0:
        dgate = nothing if residual is None or gate is None else torch.zeros_like(gate)
        columns = [factor.new_zeros(factor.shape if sums else 0) for _ in range(2)]
        return dx, dh, dgate, *columns
    rows = tokens_a_program(batch, tokens)
    programs = triton.cdiv(tokens, rows)
    kinds = 2 * sums + (residual is not None)
    partial = x.new_empty(kinds, batch, programs, channels, dtype=torch.float32)
    columns = [*partial[: 2 * sums], *[None] * (2 - 2 * sums)]
    options = {name: value for name, value in cut(channels).options.items() if name != "PARTS"}
    with on_device_of(x):
        _modulated_norm_backward_kernel[(batch * programs,)](
            *(x, residual, gate, factor, mean, rstd, grad_sum, grad_y, dx),
            *(None if gate is None else dh, None if residual is None else partial[-1], *columns),
            *(tokens, sample_stride(gate), sample_stride(factor)),
            PLUS_ONE=plus_one,
            ROWS=rows,
            **options,
        )
    dgate = nothing
    if residual is not None and gate is not None:
        dgate = partial[-1].sum(dim=1).to(gate.dtype)
    if not sums:
        return dx, dh, dgate, nothing, nothing
    over = 1 if factor.ndim == 2 else (1, 0)
    dfactor, doffset = (share.sum(dim=over).to(factor.dtype) for share in partial[:2])
    return dx, dh, dgate, dfactor, doffset
