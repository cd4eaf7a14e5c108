"""A consistency loss of whole samples: raw outputs in, losses and the online cotangent out.

Squared L2 and L1 need no sum for their gradient, so that samples of any size are one pass. Any
other distance needs the sample's norm first: where the sample does not fit one program's registers
the norm comes from a launch of its own and each launch reads each tensor once.

Bytes moved: each given tensor once, the cotangent once; above 16,384 elements, but for squared L2
and L1, the given ones twice.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastdistill.kernels._distance import kind, sign, slope
from fastdistill.kernels._sample import (
    add_shares,
    check_storage,
    cut,
    load_block,
    load_number,
    locate,
    on_device_of,
)


@triton.jit
def _consistency_kernel(
    prediction_ptr,
    x_t_ptr,
    a_ptr,
    b_ptr,
    target_ptr,
    target_x_ptr,
    target_a_ptr,
    target_b_ptr,
    weight_ptr,
    norm_ptr,
    cotangent_ptr,
    loss_ptr,
    exponent,
    offset,
    scale,
    KIND: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # D = a x_t + b F,   T = target or a_r x_r + b_r F_r,   y = D - T,   S = ||y||^2 + c^2
    # loss = w (S^(p/2) - c^p),   cotangent = scale w b p S^(p/2 - 1) y
    # L1: loss = w sum |y|,       cotangent = scale w b sign(y)
    # norm[i, part] = ||y||^2 alone, where there is no cotangent to write
    i, part, start, lanes, exists = locate(N, BLOCK, PARTS)
    target = load_block(target_ptr, start, lanes, exists)
    if target_x_ptr is not None:
        target_x = load_block(target_x_ptr, start, lanes, exists)
        target = load_number(target_a_ptr, i) * target_x + load_number(target_b_ptr, i) * target
    b = load_number(b_ptr, i)
    y = load_number(a_ptr, i) * load_block(x_t_ptr, start, lanes, exists)
    y = y + b * load_block(prediction_ptr, start, lanes, exists) - target
    if cotangent_ptr is None:
        tl.store(norm_ptr + (i * PARTS + part), tl.sum(y * y))
    else:
        if norm_ptr is not None:
            norm = add_shares(norm_ptr + i * PARTS, PARTS)
        elif KIND == "l1":
            norm = tl.sum(tl.abs(y))
        else:
            norm = tl.sum(y * y)
        weight = tl.full([], 1.0, tl.float32)
        if weight_ptr is not None:
            weight = load_number(weight_ptr, i)
        factor = scale * weight * b
        if KIND == "l1":
            loss = norm
            y = sign(y)
        elif KIND == "square":
            loss = norm
            factor *= 2.0
        else:
            square = norm + offset * offset
            factor *= slope(square, exponent, KIND)
            if KIND == "norm":  # sqrt(S) - c without its cancellation
                loss = tl.div_rn(norm, tl.where(square == 0, 1.0, tl.sqrt_rn(square) + offset))
            else:
                loss = tl.exp2(0.5 * exponent * tl.log2(norm))
        cotangent = (factor * y).to(cotangent_ptr.dtype.element_ty)
        tl.store(cotangent_ptr + start + lanes, cotangent, mask=exists)
        if norm_ptr is None:
            tl.store(loss_ptr + (i * PARTS + part), weight * loss)
        elif part == 0:
            tl.store(loss_ptr + i, weight * loss)


def consistency_cotangent(
    prediction: torch.Tensor,
    x_t: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    target: torch.Tensor,
    target_x: torch.Tensor | None,
    target_a: torch.Tensor | None,
    target_b: torch.Tensor | None,
    weight: torch.Tensor | None,
    exponent: float,
    offset: float,
    elementwise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::consistency_cotangent`, as `fastdistill.ops.consistency_cotangent`."""
    check_storage(prediction=prediction, x_t=x_t, target=target, target_x=target_x)
    cotangent = torch.empty_like(prediction)
    batch, elements = prediction.shape[0], math.prod(prediction.shape[1:])
    if batch == 0:
        return cotangent, prediction.new_empty(0, dtype=torch.float32)
    parts, options = cut(elements)
    name, grid = kind(exponent, elementwise), (batch * parts,)
    norm_first = parts > 1 and name not in ("l1", "square")
    norm = prediction.new_empty(batch, parts, dtype=torch.float32) if norm_first else None
    shares = 1 if norm_first else parts
    loss = prediction.new_empty(batch, shares, dtype=torch.float32)
    given = (
        prediction,
        x_t,
        a.contiguous(),
        b.contiguous(),
        target,
        target_x,
        None if target_a is None else target_a.contiguous(),
        None if target_b is None else target_b.contiguous(),
        None if weight is None else weight.contiguous(),
        norm,
    )
    numbers = (float(exponent), float(offset), float(scale))
    with on_device_of(prediction):
        if norm_first:
            _consistency_kernel[grid](*given, None, None, *numbers, KIND=name, **options)
        _consistency_kernel[grid](*given, cotangent, loss, *numbers, KIND=name, **options)
    return cotangent, loss.view(batch) if shares == 1 else loss.sum(dim=1)
