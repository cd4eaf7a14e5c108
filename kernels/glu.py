"""GEGLU forward and backward: both halves of the projection read, and written, where they lie.

A program has a tile of ROWS rows and COLUMNS columns of either half. COLUMNS divides the width of
every model, so that a tile needs no mask along its rows, in which threads have their 128 bits.

Bytes moved: forward x and h once; backward x, both gradients, and h where it is asked for.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import check_storage, on_device_of

_TILE = 2_048  # elements of a half: 16 a thread of four warps
_COLUMNS = 1_024
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
_TWICE_SQRT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tile(rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Rows and columns of this program, and which of them exist."""
    program = tl.program_id(0)
    row = (program // PARTS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = program % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < D)[None, :]


@triton.jit
def _load(pointer, row, column, exists, STRIDE: tl.constexpr):
    return tl.load(pointer + row * STRIDE + column, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, column, exists, value, STRIDE: tl.constexpr):
    tl.store(pointer + row * STRIDE + column, value.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def _gate(g, TANH: tl.constexpr):
    """P and P' of gelu(g) = g P(g)."""
    if TANH:
        # P = sigmoid(u),   u = 2 sqrt(2/pi) (g + 0.044715 g^3)
        p = tl.sigmoid((g + g * g * g * _CUBIC) * _TWICE_SQRT_TWO_OVER_PI)
        return p, p * (1.0 - p) * (1.0 + g * g * _CUBIC * 3.0) * _TWICE_SQRT_TWO_OVER_PI
    # P = (1 + erf(g / sqrt 2)) / 2,   P' = exp(-g^2 / 2) / sqrt(2 pi)
    return 0.5 + 0.5 * tl.erf(g * _SQRT_HALF), tl.exp(-0.5 * g * g) * _INVERSE_SQRT_TWO_PI


@triton.jit(do_not_specialize=["rows"])
def _geglu_kernel(
    x_ptr, out_ptr, rows, D: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # h = a g P(g)
    row, column, exists = _tile(rows, D, ROWS, COLUMNS, PARTS)
    a = _load(x_ptr, row, column, exists, 2 * D)
    g = _load(x_ptr + D, row, column, exists, 2 * D)
    p, _ = _gate(g, TANH)
    _store(out_ptr, row, column, exists, a * (g * p), D)


@triton.jit(do_not_specialize=["rows"])
def _geglu_backward_kernel(
    grad_ptr, x_ptr, grad_x_ptr, again_ptr, rows, D: tl.constexpr, TANH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # grad a = grad g P(g),   grad g = grad a (P(g) + g P'(g))
    row, column, exists = _tile(rows, D, ROWS, COLUMNS, PARTS)
    grad = _load(grad_ptr, row, column, exists, D)
    a = _load(x_ptr, row, column, exists, 2 * D)
    g = _load(x_ptr + D, row, column, exists, 2 * D)
    p, slope = _gate(g, TANH)
    _store(grad_x_ptr, row, column, exists, grad * (g * p), 2 * D)
    _store(grad_x_ptr + D, row, column, exists, grad * a * (p + g * slope), 2 * D)
    if again_ptr is not None:
        _store(again_ptr, row, column, exists, a * (g * p), D)


@functools.cache
def _options(width: int) -> dict[str, int | bool]:
    """Constants and launch options for halves of ``width`` columns."""
    columns = _COLUMNS
    while columns > 64 and width % columns:  # a power of two that divides the width, or 64
        columns //= 2
    rows = _TILE // columns
    parts = triton.cdiv(width, columns)
    tile = {"D": width, "ROWS": rows, "COLUMNS": columns, "PARTS": parts}
    return {**tile, "num_warps": 4, "enable_fp_fusion": True}


def _launch(kernel, x: torch.Tensor, tensors: tuple, approximate: str) -> None:
    rows, options = x.shape[:-1].numel(), _options(x.shape[-1] // 2)
    grid = (triton.cdiv(rows, options["ROWS"]) * options["PARTS"],)
    with on_device_of(x):
        kernel[grid](*tensors, rows, TANH=approximate == "tanh", **options)


def geglu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """Launch `fastdistill::geglu`, as `fastdistill.ops.geglu`."""
    check_storage(x=x)
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if out.numel():
        _launch(_geglu_kernel, x, (x, out), approximate)
    return out


def geglu_backward(
    grad: torch.Tensor, x: torch.Tensor, approximate: str, value: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::geglu_backward`, as `fastdistill.ops.geglu_backward`."""
    check_storage(grad=grad, x=x)
    grad_x = torch.empty_like(x)
    again = torch.empty_like(grad) if value else x.new_empty(x.shape[0], 0)
    if x.numel():
        tensors = (grad, x, grad_x, again if value else None)
        _launch(_geglu_backward_kernel, x, tensors, approximate)
    return grad_x, again
