"""`renoise`: the forward process with counter-based noise, and the network's input, in one pass.

    x_t         = alpha * x0 + sigma * eps,    eps = normal(key, sample)
    model_input = c_in * x_t                   rounded to the network's dtype

Shapes: x0 [B, ...], alpha, sigma, c_in [B]. The noise is regenerated from its key wherever it is
needed, never stored. Bytes moved: x0 read once, x_t and model_input written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.ops._arguments import check_batch, check_sample, per_sample
from fastdistill.ops._op import Op
from fastdistill.ops.noise import _normal, check_key


class Renoised(NamedTuple):
    """Result of `renoise`."""

    x_t: Tensor
    """Noisy sample in the dtype of x0  # [B, ...]"""
    model_input: Tensor
    """c_in * x_t in the network's dtype, or x_t itself where neither was asked for  # [B, ...]"""


def _reference(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    sample: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x0.dtype, torch.float32)
    eps = _normal.reference(key, sample, list(x0.shape[1:]), compute)
    x_t = per_sample(alpha, x0, compute) * x0.to(compute) + per_sample(sigma, x0, compute) * eps
    if input_dtype is None:
        return x_t.to(x0.dtype), x0.new_empty(x0.shape[0], 0)
    scaled = x_t if input_scale is None else per_sample(input_scale, x0, compute) * x_t
    return x_t.to(x0.dtype), scaled.to(input_dtype)


def _fake(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    sample: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if input_dtype is None:
        return torch.empty_like(x0), x0.new_empty(x0.shape[0], 0)
    return torch.empty_like(x0), torch.empty_like(x0, dtype=input_dtype)


_renoise = Op(
    "renoise",
    "(Tensor x0, Tensor alpha, Tensor sigma, Tensor key, Tensor sample, Tensor? input_scale, "
    "ScalarType? input_dtype) -> (Tensor, Tensor)",
    _reference,
    _fake,
    kernel="renoise",
    batch_outputs=2,
    replicated=(3,),
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x0, alpha, _, _, _, input_scale, input_dtype = inputs
    ctx.save_for_backward(alpha, input_scale)
    ctx.dtype, ctx.has_input = x0.dtype, input_dtype is not None


def _backward(ctx: Any, grad_x_t: Tensor, grad_input: Tensor):
    """grad x0 = alpha * (grad x_t + c_in * grad model_input)."""
    alpha, input_scale = ctx.saved_tensors
    compute = torch.promote_types(ctx.dtype, torch.float32)
    grad = grad_x_t.to(compute)
    if ctx.has_input:
        scaled = grad_input.to(compute)
        if input_scale is not None:
            scaled = per_sample(input_scale, scaled, compute) * scaled
        grad = grad + scaled
    return (per_sample(alpha, grad, compute) * grad).to(ctx.dtype), *[None] * 6


_renoise.register_autograd(_backward, _setup_context)


def renoise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    sample: Tensor,
    input_scale: Tensor | None = None,
    input_dtype: torch.dtype | None = None,
) -> Renoised:
    """Draw x_t = alpha x0 + sigma eps and, in the same pass, the input of the network.

    Differentiable in ``x0``.

    Args:
        x0: clean samples [B, ...], float32, bfloat16 or float16 (float64 off the GPU).
        alpha: signal coefficient of each sample [B].
        sigma: noise coefficient of each sample [B].
        key: (seed, stream, step), int64 [3].
        sample: global index of each sample, int64 [B].
        input_scale: c_in of each sample [B]; 1 if absent.
        input_dtype: dtype of the network's input; that of x0 if absent.

    Returns:
        `Renoised`; where neither ``input_scale`` nor ``input_dtype`` is given, both are x_t.

    Raises:
        ValueError: for shapes, dtypes or devices that do not belong together.
    """
    check_sample("x0", x0)
    check_batch(x0, alpha=alpha, sigma=sigma, input_scale=input_scale, sample=sample)
    check_key(key, sample)
    wants_input = input_scale is not None or input_dtype is not None
    dtype = (input_dtype or x0.dtype) if wants_input else None
    x_t, model_input = _renoise(x0.contiguous(), alpha, sigma, key, sample, input_scale, dtype)
    return Renoised(x_t, model_input if wants_input else x_t)
