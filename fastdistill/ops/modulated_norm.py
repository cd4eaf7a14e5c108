"""`modulated_norm`: gated residual, layer norm and modulation in one pass, forward and backward.

    x' = x + gate * h                              with a residual; gate is 1 if absent
    n  = (x' - mean) / sqrt(variance + eps)        over the channels of a token
    y  = n * (1 + scale) + shift                   one scale and shift a sample (DiT, SD3, Flux)
    y  = n * weight + bias                         or one for all (SDXL's transformer blocks)

Backward, with u = dL/dy, v = dL/dx' that comes past the norm, f = 1 + scale or weight:

    dx = 1/sqrt(...) * (u f - mean(u f) - n mean(u f n)) + v,   dh = gate * dx
    dscale = sum u n,   dshift = sum u,   dgate = sum h dx   over the tokens (weight: samples too)

Kept are inputs, and mean and 1/sqrt(...) of each token: x and h where the gate has a gradient, for
which h is needed (x' is made again in registers), and x' alone where it has none. x' is rounded to
the storage dtype before it is normalised, as the next layer sees it.

Shapes: x, h [B, T, C]; scale, shift, gate [B, C] whose samples may lie apart, as chunks of one
tensor do; weight, bias [C]. Bytes moved: forward x and h read, x' and y written; backward u, v, x
and h (or x') read, dx and dh written. All arithmetic is float32 whatever the storage (float64 for
float64 storage).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.ops._op import Op
from fastdistill.ops._tokens import check_channels, check_tokens, dense_channels, wide


class Normed(NamedTuple):
    """Result of `modulated_norm`."""

    sum: Tensor
    """x' = x + gate * h, in the dtype of x; x itself without a residual  # [B, T, C]"""
    y: Tensor
    """Normalised and modulated, in the dtype of x  # [B, T, C]"""


def _add(x: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * h, in the dtype of x."""
    compute = torch.promote_types(x.dtype, torch.float32)
    h = residual.to(compute)
    return (x.to(compute) + (h if gate is None else wide(gate, compute) * h)).to(x.dtype)


def _reference(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    factor: Tensor,
    offset: Tensor,
    plus_one: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0) if residual is None else _add(x, residual, gate)
    value = (x if residual is None else total).to(compute)
    variance, mean = torch.var_mean(value, dim=-1, correction=0)
    rstd = (variance + eps).rsqrt()
    n = (value - mean[..., None]) * rstd[..., None]
    y = n * (wide(factor, compute) + plus_one) + wide(offset, compute)
    return total, y.to(x.dtype), mean, rstd


def _fake(x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0 if residual is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=compute) for _ in range(2))
    return total, x.new_empty(x.shape), mean, rstd


def _backward_reference(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    factor: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_sum: Tensor | None,
    grad_y: Tensor,
    plus_one: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    value = x if residual is None else _add(x, residual, gate)
    n = (value.to(compute) - mean[..., None]) * rstd[..., None]
    u = grad_y.to(compute)
    w = u * (wide(factor, compute) + plus_one)
    dx = w - w.mean(dim=-1, keepdim=True) - n * (w * n).mean(dim=-1, keepdim=True)
    dx = rstd[..., None] * dx
    if grad_sum is not None:
        dx = dx + grad_sum.to(compute)
    dh = dgate = dfactor = doffset = x.new_empty(0)
    if gate is not None:
        dh = (wide(gate, compute) * dx).to(x.dtype)
    if gate is not None and residual is not None:
        dgate = (residual.to(compute) * dx).sum(dim=1).to(gate.dtype)
    if sums:
        over = 1 if factor.ndim == 2 else (0, 1)
        dfactor, doffset = (v.sum(dim=over).to(factor.dtype) for v in (u * n, u))
    return dx.to(x.dtype), dh, dgate, dfactor, doffset


def _backward_fake(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    factor: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_sum: Tensor | None,
    grad_y: Tensor,
    plus_one: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dfactor, doffset = (factor.new_empty(factor.shape if sums else 0) for _ in range(2))
    dgate = x.new_empty(0)
    if gate is not None and residual is not None:
        dgate = gate.new_empty(gate.shape)
    dh = x.new_empty(0 if gate is None else x.shape)
    return x.new_empty(x.shape), dh, dgate, dfactor, doffset


_modulated_norm = Op(
    "modulated_norm",
    "(Tensor x, Tensor? residual, Tensor? gate, Tensor factor, Tensor offset, bool plus_one, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    kernel="modulated_norm",
    batch_outputs=4,
    replicated=None,
    native_cpu=False,
)
_modulated_norm_backward = Op(
    "modulated_norm_backward",
    "(Tensor x, Tensor? residual, Tensor? gate, Tensor factor, Tensor mean, Tensor rstd, "
    "Tensor? grad_sum, Tensor grad_y, bool plus_one, bool sums) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    kernel="modulated_norm",
    batch_outputs=5,
    replicated=None,
    native_cpu=False,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, gate, factor, _, ctx.plus_one, _ = inputs
    total, _, mean, rstd = output
    kept = residual if ctx.needs_input_grad[2] else None
    value = total if kept is None and residual is not None else x
    ctx.save_for_backward(value, kept, gate, factor, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.dtypes = [getattr(value, "dtype", None) for value in inputs[:5]]


def _backward(ctx: Any, grad_sum: Tensor | None, grad_y: Tensor | None, *_: Any) -> Any:
    value, residual, gate, factor, mean, rstd = ctx.saved_tensors
    grad_y = torch.zeros_like(value) if grad_y is None else grad_y.contiguous()
    sums = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    grad_sum = grad_sum.contiguous() if ctx.has_residual and grad_sum is not None else None
    dx, dh, dgate, dfactor, doffset = _modulated_norm_backward(
        *(value, residual, gate, factor, mean, rstd, grad_sum, grad_y, ctx.plus_one, sums)
    )
    found = zip(
        (dx, dx if gate is None else dh, dgate, dfactor, doffset),
        ctx.dtypes,
        ctx.needs_input_grad[:5],
        strict=True,
    )
    return *(value.to(dtype) if need else None for value, dtype, need in found), None, None


_modulated_norm.register_autograd(_backward, _setup_context)


def modulated_norm(
    x: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> Normed:
    """Layer norm over the channels, modulated, after an optional gated residual.

    Differentiable once in every tensor.

    Args:
        x: tokens [B, T, C].
        scale: y = n * (1 + scale) + shift, one a sample [B, C].
        shift: beside ``scale`` [B, C].
        weight: in the place of scale and shift, y = n * weight + bias [C].
        bias: beside ``weight`` [C].
        residual: h, added to x before the norm [B, T, C].
        gate: factor of the residual, one a sample [B, C]; 1 if absent.
        eps: added to the variance.

    Returns:
        `Normed`. Both results have the dtype of x.

    Raises:
        ValueError: for shapes, dtypes or devices that do not belong together, for anything but one
            of (scale, shift) and (weight, bias), and for a gate without a residual.
    """
    check_tokens("x", x)
    modulated = scale is not None and shift is not None and weight is None and bias is None
    affine = weight is not None and bias is not None and scale is None and shift is None
    if not modulated and not affine:
        raise ValueError("give scale and shift [B, C], or weight and bias [C], and not both")
    factor, offset = (scale, shift) if modulated else (weight, bias)
    assert factor is not None
    assert offset is not None
    check_channels("scale" if modulated else "weight", factor, x, modulated)
    check_channels("shift" if modulated else "bias", offset, x, modulated)
    if residual is not None:
        check_tokens("residual", residual, x)
        residual = residual.contiguous()
    if gate is not None:
        if residual is None:
            raise ValueError("gate is the factor of a residual, which is absent")
        check_channels("gate", gate, x, True)
        gate = dense_channels(gate)
    x = x.contiguous()
    total, y, _, _ = _modulated_norm(
        *(x, residual, gate, dense_channels(factor), dense_channels(offset), modulated, eps)
    )
    return Normed(x if residual is None else total, y)
