"""The tail of a pathwise distillation loss: raw outputs in, the student's cotangent out.

A sample that fits one program's registers is read once. Above that the normaliser, which every
element needs, comes from a launch of its own; each launch reads each tensor that it needs once.
Without normalisation one launch is enough at any size.

Bytes moved: each given tensor once, the cotangent once; above 16,384 elements (8,192 with an
unconditional critic) with normalisation, x_t and the teacher's outputs twice.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import (
    add_shares,
    check_storage,
    cut,
    load_block,
    load_number,
    locate,
    on_device_of,
)

NORMALISER_FLOOR = tl.constexpr(1e-6)


@triton.jit
def _guided(teacher_ptr, uncond_ptr, guidance, start, lanes, exists):
    """F_phi = F_phi(uncond) + guidance (F_phi(cond) - F_phi(uncond))."""
    f_phi = load_block(teacher_ptr, start, lanes, exists)
    if uncond_ptr is not None:
        uncond = load_block(uncond_ptr, start, lanes, exists)
        f_phi = uncond + guidance * (f_phi - uncond)
    return f_phi


@triton.jit
def _absolute_residual(x0_ptr, x_t, f_phi, a_phi, b_phi, start, lanes, exists):
    """Sum of |x0 - D_phi| over the elements of this program, D_phi = a_phi x_t + b_phi F_phi."""
    x0 = load_block(x0_ptr, start, lanes, exists)
    return tl.sum(tl.where(exists, tl.abs(x0 - (a_phi * x_t + b_phi * f_phi)), 0.0))


@triton.jit
def _residual_kernel(
    x0_ptr,
    x_t_ptr,
    teacher_ptr,
    teacher_uncond_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    residual_ptr,
    guidance,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # residual[i, part] = sum |x0 - D_phi|
    i, part, start, lanes, exists = locate(N, BLOCK, PARTS)
    f_phi = _guided(teacher_ptr, teacher_uncond_ptr, guidance, start, lanes, exists)
    x_t = load_block(x_t_ptr, start, lanes, exists)
    a_phi, b_phi = load_number(teacher_a_ptr, i), load_number(teacher_b_ptr, i)
    residual = _absolute_residual(x0_ptr, x_t, f_phi, a_phi, b_phi, start, lanes, exists)
    tl.store(residual_ptr + (i * PARTS + part), residual)


@triton.jit
def _matching_kernel(
    x0_ptr,
    x_t_ptr,
    teacher_ptr,
    teacher_uncond_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    critic_ptr,
    critic_uncond_ptr,
    critic_a_ptr,
    critic_b_ptr,
    weight_ptr,
    residual_ptr,
    cotangent_ptr,
    statistics_ptr,
    guidance,
    esd_lambda,
    gain,
    NORMALISE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # F_psi     = F_psi(cond) + lambda (F_psi(uncond) - F_psi(cond))
    # Delta     = b_psi (F_psi - F_phi) + (b_psi - b_phi) F_phi + (a_psi - a_phi) x_t
    # g         = w Delta / (mean |x0 - D_phi| + floor),   0 where that is not finite
    # cotangent = gain g,   gain = scale / N
    i, part, start, lanes, exists = locate(N, BLOCK, PARTS)
    f_phi = _guided(teacher_ptr, teacher_uncond_ptr, guidance, start, lanes, exists)
    f_psi = load_block(critic_ptr, start, lanes, exists)
    if critic_uncond_ptr is not None:
        f_psi += esd_lambda * (load_block(critic_uncond_ptr, start, lanes, exists) - f_psi)
    x_t = load_block(x_t_ptr, start, lanes, exists)
    a_phi, b_phi = load_number(teacher_a_ptr, i), load_number(teacher_b_ptr, i)
    a_psi, b_psi = load_number(critic_a_ptr, i), load_number(critic_b_ptr, i)
    gap = b_psi * (f_psi - f_phi) + (b_psi - b_phi) * f_phi + (a_psi - a_phi) * x_t

    if residual_ptr is None:
        residual = _absolute_residual(x0_ptr, x_t, f_phi, a_phi, b_phi, start, lanes, exists)
        whole = residual  # used only where this program has the whole sample
    else:
        residual = tl.load(residual_ptr + (i * PARTS + part))
        whole = add_shares(residual_ptr + i * PARTS, PARTS)

    factor = tl.full([], 1.0, tl.float32)
    if weight_ptr is not None:
        factor = load_number(weight_ptr, i)
    if NORMALISE:
        factor = tl.div_rn(factor, whole / N + NORMALISER_FLOOR)
    finite = tl.abs(factor * gap) < float("inf")  # false for NaN
    statistics = statistics_ptr + (i * PARTS + part) * 4
    # Counting first lets `finite` go, and making g anew from Delta keeps one block in registers
    # instead of three; without both, 16,384 elements spill where dtypes are mixed.
    tl.store(statistics + 3, tl.sum(tl.where(finite | ~exists, 0.0, 1.0)))
    gap = tl.where(finite, gap, 0.0)
    factor = tl.where(tl.abs(factor) < float("inf"), factor, 0.0)  # else no g was finite
    g = factor * gap
    cotangent = (gain * g).to(cotangent_ptr.dtype.element_ty)
    tl.store(cotangent_ptr + start + lanes, cotangent, mask=exists)
    tl.store(statistics, tl.sum(g * g) / (2 * N))
    tl.store(statistics + 1, residual / N)
    tl.store(statistics + 2, tl.sum(gap * gap) / N)


def matching_cotangent(
    x0: torch.Tensor,
    x_t: torch.Tensor,
    teacher: torch.Tensor,
    teacher_a: torch.Tensor,
    teacher_b: torch.Tensor,
    critic: torch.Tensor,
    critic_a: torch.Tensor,
    critic_b: torch.Tensor,
    teacher_uncond: torch.Tensor | None,
    guidance_scale: float,
    critic_uncond: torch.Tensor | None,
    esd_lambda: float,
    weight: torch.Tensor | None,
    normalise: bool,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::matching_cotangent`, as `fastdistill.ops.matching_cotangent`."""
    check_storage(
        x0=x0,
        x_t=x_t,
        teacher=teacher,
        critic=critic,
        teacher_uncond=teacher_uncond,
        critic_uncond=critic_uncond,
        dtype=dtype,
    )
    batch, elements = x0.shape[0], math.prod(x0.shape[1:])
    cotangent = torch.empty_like(x0, dtype=dtype)
    if batch == 0:
        return cotangent, x0.new_empty(0, 4, dtype=torch.float32)
    # With six tensors 16,384 elements are at the edge of the registers; five leave a margin.
    parts, options = cut(elements, 16_384 if critic_uncond is None else 8_192)
    grid = (batch * parts,)
    statistics = x0.new_empty(batch, parts, 4, dtype=torch.float32)
    guided = (x_t, teacher, teacher_uncond, teacher_a.contiguous(), teacher_b.contiguous())
    residual = None
    with on_device_of(x0):
        if normalise and parts > 1:
            residual = x0.new_empty(batch, parts, dtype=torch.float32)
            _residual_kernel[grid](x0, *guided, residual, float(guidance_scale), **options)
        _matching_kernel[grid](
            x0 if residual is None else None,
            *guided,
            critic,
            critic_uncond,
            critic_a.contiguous(),
            critic_b.contiguous(),
            None if weight is None else weight.contiguous(),
            residual,
            cotangent,
            statistics,
            float(guidance_scale),
            float(esd_lambda),
            scale / elements,
            NORMALISE=bool(normalise),
            **options,
        )
    return cotangent, statistics.view(batch, 4) if parts == 1 else statistics.sum(dim=1)
