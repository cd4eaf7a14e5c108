"""x + gate * h of tokens, and its gradients: a program a token, and some tokens a program.

Bytes moved: forward x, h and y once; backward the gradient, h and dh once, and 1/16 of a float32
row a token or less of partial sums, which torch adds.
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
def _gated_residual_kernel(
    x_ptr,
    h_ptr,
    gate_ptr,
    y_ptr,
    tokens,
    gate_stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # y = x + g h
    row, _, start, lanes, exists = locate(N, BLOCK, PARTS)
    gate = load_block(gate_ptr, row // tokens * gate_stride, lanes, exists)
    y = gate * load_block(h_ptr, start, lanes, exists) + load_block(x_ptr, start, lanes, exists)
    tl.store(y_ptr + start + lanes, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["tokens"])
def _gated_residual_backward_kernel(
    h_ptr,
    gate_ptr,
    grad_ptr,
    dh_ptr,
    dgate_ptr,
    tokens,
    gate_stride,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # dh = g u,   dg = sum h u over the tokens of this program
    sample, first, row, lanes = locate_tokens(tokens, ROWS, BLOCK)
    real = lanes < N
    gate = load_block(gate_ptr, sample * gate_stride, lanes, real)
    dgate = tl.zeros([BLOCK], tl.float32)
    for k in range(ROWS):
        exists = real & (first + k < tokens)
        start = (row + k) * N
        u = load_block(grad_ptr, start, lanes, exists)
        if dgate_ptr is not None:
            dgate += load_block(h_ptr, start, lanes, exists) * u
        tl.store(dh_ptr + start + lanes, (gate * u).to(dh_ptr.dtype.element_ty), mask=exists)
    if dgate_ptr is not None:
        store_sum(dgate_ptr, dgate, lanes, N)


def gated_residual(x: torch.Tensor, h: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Launch `fastdistill::gated_residual`, as `fastdistill.ops.gated_residual`."""
    check_storage(x=x, h=h, gate=gate.dtype)
    batch, tokens, channels = x.shape
    check_row(channels)
    y = torch.empty_like(x)
    if y.numel() > 0:
        with on_device_of(x):
            _gated_residual_kernel[(batch * tokens,)](
                *(x, h, gate, y, tokens, sample_stride(gate)), **cut(channels).options
            )
    return y


def gated_residual_backward(
    grad: torch.Tensor, gate: torch.Tensor, h: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::gated_residual_backward`, the gradients of `gated_residual`."""
    check_storage(h=h, gate=gate.dtype, grad=grad)
    batch, tokens, channels = grad.shape
    dh = torch.empty_like(grad)
    if grad.numel() == 0:
        return dh, gate.new_zeros(0 if h is None else gate.shape)
    rows = tokens_a_program(batch, tokens)
    programs = triton.cdiv(tokens, rows)
    shape = (batch, programs, channels)
    partial = None if h is None else grad.new_empty(shape, dtype=torch.float32)
    options = {name: value for name, value in cut(channels).options.items() if name != "PARTS"}
    with on_device_of(grad):
        _gated_residual_backward_kernel[(batch * programs,)](
            *(h, gate, grad, dh, partial, tokens, sample_stride(gate)), ROWS=rows, **options
        )
    return dh, gate.new_empty(0) if partial is None else partial.sum(dim=1).to(gate.dtype)
