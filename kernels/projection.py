"""The tail of a score-projection loss: raw outputs in, a cotangent of each out.

Every gradient needs three sums over its sample (four for L1). A sample that fits one program's
registers is read once: what the sums leave are two blocks, the gap E and the residual R. Above that
the sums come from a launch of their own and each launch reads each tensor once.

Bytes moved: each given tensor once, a cotangent of each once; above 16,384 elements the given ones
twice.
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

NORMALISER_FLOOR = tl.constexpr(1e-5)


@triton.jit
def _gap_and_residual(
    x0_ptr,
    x_t_ptr,
    teacher_ptr,
    teacher_uncond_ptr,
    critic_ptr,
    guidance,
    a_phi,
    b_phi,
    a_psi,
    b_psi,
    start,
    lanes,
    exists,
):
    """E = D_phi - D_psi without a cancellation of a x_t, and R = D_phi - x0; 0 past the sample."""
    f_phi = load_block(teacher_ptr, start, lanes, exists)
    if teacher_uncond_ptr is not None:
        uncond = load_block(teacher_uncond_ptr, start, lanes, exists)
        f_phi = uncond + guidance * (f_phi - uncond)
    x_t = load_block(x_t_ptr, start, lanes, exists)
    residual = a_phi * x_t + b_phi * f_phi - load_block(x0_ptr, start, lanes, exists)
    gap = b_psi * (f_phi - load_block(critic_ptr, start, lanes, exists))
    gap += (b_phi - b_psi) * f_phi + (a_phi - a_psi) * x_t
    return gap, residual


@triton.jit
def _sums(gap, residual, KIND: tl.constexpr):
    """<E, E>, <d, R>, <d, E> and sum |R|, with d = sign(E) for L1 and E for all others."""
    square = tl.sum(gap * gap)
    if KIND == "l1":
        product, length = tl.sum(sign(gap) * residual), tl.sum(tl.abs(gap))
    else:
        product, length = tl.sum(gap * residual), square
    return square, product, length, tl.sum(tl.abs(residual))


@triton.jit
def _sums_kernel(
    x0_ptr,
    x_t_ptr,
    teacher_ptr,
    teacher_uncond_ptr,
    critic_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    critic_a_ptr,
    critic_b_ptr,
    sums_ptr,
    guidance,
    KIND: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # sums[i, :, part] = <E, E>, <d, R>, <d, E>, sum |R|
    i, part, start, lanes, exists = locate(N, BLOCK, PARTS)
    a_phi, b_phi = load_number(teacher_a_ptr, i), load_number(teacher_b_ptr, i)
    a_psi, b_psi = load_number(critic_a_ptr, i), load_number(critic_b_ptr, i)
    gap, residual = _gap_and_residual(
        x0_ptr, x_t_ptr, teacher_ptr, teacher_uncond_ptr, critic_ptr, guidance,
        a_phi, b_phi, a_psi, b_psi, start, lanes, exists,
    )  # fmt: skip
    square, product, length, absolute = _sums(gap, residual, KIND)
    sums = sums_ptr + (i * 4 * PARTS + part)
    tl.store(sums, square)
    tl.store(sums + PARTS, product)
    tl.store(sums + 2 * PARTS, length)
    tl.store(sums + 3 * PARTS, absolute)


@triton.jit
def _projection_kernel(
    x0_ptr,
    x_t_ptr,
    teacher_ptr,
    teacher_uncond_ptr,
    critic_ptr,
    teacher_a_ptr,
    teacher_b_ptr,
    critic_a_ptr,
    critic_b_ptr,
    weight_ptr,
    score_scale_ptr,
    sums_ptr,
    to_x0_ptr,
    to_x_t_ptr,
    to_teacher_ptr,
    to_uncond_ptr,
    to_critic_ptr,
    statistics_ptr,
    guidance,
    exponent,
    offset,
    alpha,
    scale,
    KIND: tl.constexpr,
    NORMALISE: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # S = k^2 <E, E> + c^2,   G = p S^(p/2 - 1),   P = k^2 <E, R - alpha E>,   tau = (p - 2) P / S
    # m = w k^2 G / n,   n = max(mean |R|, floor) or 1,   loss = w G P / n
    # to D_phi = m (R + (1 - 2 alpha + tau) E),   to D_psi = -m (R - (2 alpha - tau) E)
    # L1: m = w k / n,   m (1 - alpha) sign(E),   m alpha sign(E);   to x0: -m E or -m sign(E)
    i, part, start, lanes, exists = locate(N, BLOCK, PARTS)
    a_phi, b_phi = load_number(teacher_a_ptr, i), load_number(teacher_b_ptr, i)
    a_psi, b_psi = load_number(critic_a_ptr, i), load_number(critic_b_ptr, i)
    gap, residual = _gap_and_residual(
        x0_ptr, x_t_ptr, teacher_ptr, teacher_uncond_ptr, critic_ptr, guidance,
        a_phi, b_phi, a_psi, b_psi, start, lanes, exists,
    )  # fmt: skip
    if sums_ptr is None:
        square, product, length, absolute = _sums(gap, residual, KIND)
    else:
        sums = sums_ptr + i * 4 * PARTS
        square, product = add_shares(sums, PARTS), add_shares(sums + PARTS, PARTS)
        length, absolute = add_shares(sums + 2 * PARTS, PARTS), add_shares(sums + 3 * PARTS, PARTS)

    m = tl.full([], 1.0, tl.float32)
    if weight_ptr is not None:
        m = load_number(weight_ptr, i)
    if NORMALISE:
        m = tl.div_rn(m, tl.maximum(absolute / N, NORMALISER_FLOOR))
    k = tl.full([], 1.0, tl.float32)
    if score_scale_ptr is not None:
        k = load_number(score_scale_ptr, i)
    product -= alpha * length
    if KIND == "l1":
        m *= k
        loss = m * product
        of_phi, of_psi = m * (1.0 - alpha), m * alpha
    else:
        total = k * k * square + offset * offset
        product *= k * k
        gradient = slope(total, exponent, KIND)
        loss = m * gradient * product
        m *= k * k * gradient
        tau = 0.0
        if KIND != "square":
            tau = (exponent - 2.0) * tl.div_rn(product, tl.where(total == 0, 1.0, total))
            tau = tl.where(total == 0, 0.0, tau)
        of_phi, of_psi = m * (1.0 - 2.0 * alpha + tau), m * (2.0 * alpha - tau)

    # A sample whose loss is not finite leaves zeros everywhere.
    kept = tl.abs(loss) < float("inf")  # false for NaN
    if part == 0:
        statistics = statistics_ptr + i * 4
        tl.store(statistics, tl.where(kept, loss, 0.0))
        tl.store(statistics + 1, tl.where(kept, absolute / N, 0.0))
        tl.store(statistics + 2, tl.where(kept, square / N, 0.0))
        tl.store(statistics + 3, tl.where(kept, 0.0, 1.0))
    m = tl.where(kept, scale * m, 0.0)
    of_phi, of_psi = tl.where(kept, scale * of_phi, 0.0), tl.where(kept, scale * of_psi, 0.0)
    gap = tl.where(kept, gap, 0.0)
    if KIND == "l1":
        gap = sign(gap)
        to_phi, to_psi = of_phi * gap, of_psi * gap
    else:
        residual = m * tl.where(kept, residual, 0.0)
        to_phi, to_psi = residual + of_phi * gap, of_psi * gap - residual
    tl.store(to_x0_ptr + start + lanes, (-m * gap).to(to_x0_ptr.dtype.element_ty), mask=exists)
    to_x_t = (a_phi * to_phi + a_psi * to_psi).to(to_x_t_ptr.dtype.element_ty)
    tl.store(to_x_t_ptr + start + lanes, to_x_t, mask=exists)
    to_critic = (b_psi * to_psi).to(to_critic_ptr.dtype.element_ty)
    tl.store(to_critic_ptr + start + lanes, to_critic, mask=exists)
    to_teacher = b_phi * to_phi
    if teacher_uncond_ptr is not None:
        to_uncond = ((1.0 - guidance) * to_teacher).to(to_uncond_ptr.dtype.element_ty)
        tl.store(to_uncond_ptr + start + lanes, to_uncond, mask=exists)
        to_teacher *= guidance
    to_teacher = to_teacher.to(to_teacher_ptr.dtype.element_ty)
    tl.store(to_teacher_ptr + start + lanes, to_teacher, mask=exists)


def projection_cotangents(
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
    weight: torch.Tensor | None,
    score_scale: torch.Tensor | None,
    exponent: float,
    offset: float,
    elementwise: bool,
    alpha: float,
    normalise: bool,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Launch `fastdistill::projection_cotangents`, as `fastdistill.ops.projection_cotangents`."""
    check_storage(x0=x0, x_t=x_t, teacher=teacher, critic=critic, teacher_uncond=teacher_uncond)
    batch, elements = x0.shape[0], math.prod(x0.shape[1:])
    cotangents = (
        torch.empty_like(x0),
        torch.empty_like(x_t),
        torch.empty_like(teacher),
        x0.new_empty(batch, 0) if teacher_uncond is None else torch.empty_like(teacher_uncond),
        torch.empty_like(critic),
    )
    statistics = x0.new_empty(batch, 4, dtype=torch.float32)
    if batch == 0:
        return *cotangents, statistics
    parts, options = cut(elements)
    grid = (batch * parts,)
    given = (
        x0,
        x_t,
        teacher,
        teacher_uncond,
        critic,
        teacher_a.contiguous(),
        teacher_b.contiguous(),
        critic_a.contiguous(),
        critic_b.contiguous(),
    )
    name, sums = kind(exponent, elementwise), None
    with on_device_of(x0):
        if parts > 1:
            sums = x0.new_empty(batch, 4, parts, dtype=torch.float32)
            _sums_kernel[grid](*given, sums, float(guidance_scale), KIND=name, **options)
        _projection_kernel[grid](
            *given,
            None if weight is None else weight.contiguous(),
            None if score_scale is None else score_scale.contiguous(),
            sums,
            *cotangents,
            statistics,
            float(guidance_scale),
            float(exponent),
            float(offset),
            float(alpha),
            float(scale),
            KIND=name,
            NORMALISE=bool(normalise),
            **options,
        )
    return *cotangents, statistics
