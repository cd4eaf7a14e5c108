"""`gated_residual`: x + gate * h in one pass, forward and backward, where no norm follows.

    y = x + gate * h,   dx = u,   dh = gate * u,   dgate = sum h u over the tokens,   u = dL/dy

h is kept for the backward pass where the gate has a gradient, and nothing else of its size.

Shapes: x, h [B, T, C]; gate [B, C], whose samples may lie apart as chunks of one tensor do. Bytes
moved: forward x and h read, y written; backward u and h read, dh written. All arithmetic is float32
whatever the storage (float64 for float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops._op import Op
from fastdistill.ops._tokens import check_channels, check_tokens, dense_channels, wide


def _reference(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute) + wide(gate, compute) * h.to(compute)).to(x.dtype)


def _backward_reference(grad: Tensor, gate: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(grad.dtype, torch.float32)
    u = grad.to(compute)
    dh = (wide(gate, compute) * u).to(grad.dtype)
    if h is None:
        return dh, grad.new_empty(0)
    return dh, (h.to(compute) * u).sum(dim=1).to(gate.dtype)


_gated_residual = Op(
    "gated_residual",
    "(Tensor x, Tensor h, Tensor gate) -> Tensor",
    _reference,
    lambda x, h, gate: x.new_empty(x.shape),
    kernel="gated_residual",
    native_cpu=False,
)
_gated_residual_backward = Op(
    "gated_residual_backward",
    "(Tensor grad, Tensor gate, Tensor? h) -> (Tensor, Tensor)",
    _backward_reference,
    lambda grad, gate, h: (
        grad.new_empty(grad.shape),
        gate.new_empty(0 if h is None else gate.shape),
    ),
    kernel="gated_residual",
    batch_outputs=2,
    native_cpu=False,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, h, gate = inputs
    ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, gate)
    ctx.dtypes = [x.dtype, h.dtype]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, gate = ctx.saved_tensors
    dx = grad.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1] and h is None:
        return dx, None, None
    dh, dgate = _gated_residual_backward(grad.contiguous(), gate, h)
    return dx, dh.to(ctx.dtypes[1]), None if h is None else dgate


_gated_residual.register_autograd(_backward, _setup_context)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """The residual stream x plus a layer's output times the gate of its sample.

    Differentiable once in every tensor.

    Args:
        x: tokens [B, T, C].
        h: a layer's output [B, T, C].
        gate: factor of h, one a sample [B, C].

    Returns:
        x + gate * h in the dtype of x  # [B, T, C]

    Raises:
        ValueError: for shapes, dtypes or devices that do not belong together.
    """
    check_tokens("x", x)
    check_tokens("h", h, x)
    check_channels("gate", gate, x, True)
    return _gated_residual(x.contiguous(), h.contiguous(), dense_channels(gate))
