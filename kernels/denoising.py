"""The denoising score-matching loss of a raw network output and its gradient, in one launch.

The loss does not feed the cotangent, so that samples of any size are one pass: each program writes
its cotangents and its share of the loss, and shares are summed in a fixed order afterwards.

Bytes moved: the raw output, x0 and x_t once each, the cotangent once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import (
    check_storage,
    cut,
    load_block,
    load_number,
    locate,
    on_device_of,
)


@triton.jit
def _denoising_kernel(
    prediction_ptr,
    x0_ptr,
    x_t_ptr,
    a_ptr,
    b_ptr,
    weight_ptr,
    cotangent_ptr,
    loss_ptr,
    gain,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # D         = a x_t + b F
    # loss      = w / N sum (D - x0)^2
    # cotangent = gain w b (D - x0),   gain = 2 scale / N
    i, part, start, lanes, exists = locate(N, BLOCK, PARTS)
    prediction = load_block(prediction_ptr, start, lanes, exists)
    x0 = load_block(x0_ptr, start, lanes, exists)
    x_t = load_block(x_t_ptr, start, lanes, exists)
    a, b = load_number(a_ptr, i), load_number(b_ptr, i)
    residual = a * x_t + b * prediction - x0
    loss = tl.sum(tl.where(exists, residual * residual, 0.0)) / N
    factor = gain * b
    if weight_ptr is not None:
        weight = load_number(weight_ptr, i)
        loss = weight * loss
        factor = weight * factor
    cotangent = (factor * residual).to(cotangent_ptr.dtype.element_ty)
    tl.store(cotangent_ptr + start + lanes, cotangent, mask=exists)
    tl.store(loss_ptr + (i * PARTS + part), loss)


def denoising_cotangent(
    prediction: torch.Tensor,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::denoising_cotangent`, as `fastdistill.ops.denoising_cotangent`."""
    check_storage(prediction=prediction, x0=x0, x_t=x_t)
    cotangent = torch.empty_like(prediction)
    batch, elements = prediction.shape[0], math.prod(prediction.shape[1:])
    if batch == 0:
        return cotangent, x0.new_empty(0, dtype=torch.float32)
    parts, options = cut(elements)
    loss = x0.new_empty(batch, parts, dtype=torch.float32)
    with on_device_of(x0):
        _denoising_kernel[(batch * parts,)](
            prediction,
            x0,
            x_t,
            a.contiguous(),
            b.contiguous(),
            None if weight is None else weight.contiguous(),
            cotangent,
            loss,
            2.0 * scale / elements,
            **options,
        )
    return cotangent, loss.view(batch) if parts == 1 else loss.sum(dim=1)
