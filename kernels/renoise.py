"""The forward process with noise made in registers, and the network's input, in one launch.

The noise comes out of its threads in element order, so that x0 is read and both results are written
with 128-bit accesses.

Bytes moved: x0 once, x_t once, the network's input once where it is asked for.
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
from fastdistill.kernels.noise import NOISE_BLOCK, normal_block


@triton.jit
def _renoise_kernel(
    x0_ptr,
    alpha_ptr,
    sigma_ptr,
    key_ptr,
    sample_ptr,
    input_scale_ptr,
    x_t_ptr,
    input_ptr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # x_t = alpha x0 + sigma eps,   eps = normal(key, sample)
    # model_input = c_in x_t        from x_t before it is rounded
    i, part, start, lanes, exists = locate(N, BLOCK, PARTS)
    x0 = load_block(x0_ptr, start, lanes, exists)
    eps = normal_block(key_ptr, tl.load(sample_ptr + i), part, BLOCK)
    x_t = load_number(alpha_ptr, i) * x0 + load_number(sigma_ptr, i) * eps
    tl.store(x_t_ptr + start + lanes, x_t.to(x_t_ptr.dtype.element_ty), mask=exists)
    if input_ptr is not None:
        if input_scale_ptr is not None:
            x_t = load_number(input_scale_ptr, i) * x_t
        tl.store(input_ptr + start + lanes, x_t.to(input_ptr.dtype.element_ty), mask=exists)


def renoise(
    x0: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    key: torch.Tensor,
    sample: torch.Tensor,
    input_scale: torch.Tensor | None,
    input_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::renoise`; the arguments are those of `fastdistill.ops.renoise`."""
    check_storage(x0=x0, input_dtype=input_dtype)
    x_t = torch.empty_like(x0)
    wanted = input_dtype is not None
    model_input = x0.new_empty(x0.shape if wanted else (x0.shape[0], 0), dtype=input_dtype)
    if x0.numel() == 0:
        return x_t, model_input
    elements = math.prod(x0.shape[1:])
    parts, options = cut(elements, NOISE_BLOCK, NOISE_BLOCK)
    with on_device_of(x0):
        _renoise_kernel[(x0.shape[0] * parts,)](
            x0,
            alpha.contiguous(),
            sigma.contiguous(),
            key.contiguous(),
            sample.contiguous(),
            None if input_scale is None else input_scale.contiguous(),
            x_t,
            model_input if wanted else None,
            **options,
        )
    return x_t, model_input
