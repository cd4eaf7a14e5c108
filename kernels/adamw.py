"""Clip, finite check, AdamW, averages and low-precision copy of a flat range, in one launch.

A length that is a multiple of 16, as arenas have, keeps 128-bit accesses under a mask and is one
launch; of another length the last few elements are a launch of their own. A second launch counts
the step up once every program has read it. Nothing is compiled anew for another length, learning
rate or step: numbers are arguments, and those that the host must form in float64 (1 - beta,
ln beta, 1 - decay) come from there.

Bytes moved, float32 state: parameter, moments and each EMA read and written once, the gradient read
once, the copy written once: 38 bytes a parameter with float32 gradients, one EMA and a bfloat16
copy, 22 + 8 for each further EMA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import check_storage, on_device_of, target
from fastdistill.kernels.noise import in_order, words

CLIP_FLOOR = tl.constexpr(1e-6)
_BLOCK, _THREADS = 1_024, 128  # 8 elements a thread: 128 bits of the narrowest dtype
_TAIL = 16
_SAMPLE = tl.constexpr(2**34)  # elements that Philox counts before it takes the next sample


@triton.jit
def _one_minus_power(log_base, exponent):
    """1 - base^exponent = -expm1(exponent ln base) to 2 ulp, for a base in [0, 1]."""
    x = tl.maximum(exponent * log_base, -100.0)
    series = tl.full([], 1.0, tl.float32)  # (e^x - 1) / x by Horner's rule, for |x| <= 1/2
    for done in tl.static_range(8):
        series = 1.0 + x / (9 - done) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _is_finite(squared_norm_ptr):
    return tl.abs(tl.load(squared_norm_ptr).to(tl.float32)) < float("inf")  # false for NaN


@triton.jit
def _stochastic_bfloat16(value, key_ptr, block, BLOCK: tl.constexpr):
    """bfloat16(bits + w), w < 2^16 random, with the low 16 bits cut; inf and NaN stay."""
    w0, w1, w2, w3 = words(key_ptr, block // (_SAMPLE // BLOCK), block, BLOCK)
    bits = value.to(tl.uint32, bitcast=True) + (in_order(w0, w1, w2, w3, BLOCK) >> 16)
    rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), rounded, value).to(tl.bfloat16)


@triton.jit(do_not_specialize=["first"])
def _adamw_kernel(
    parameter_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,
    ema_ptrs,
    copy_ptr,
    squared_norm_ptr,
    grad_scale_ptr,
    lr_factor_ptr,
    key_ptr,
    first,
    length,
    starts,
    lrs,
    weight_decays,
    beta1,
    rest1,
    log1,
    beta2,
    rest2,
    log2,
    eps,
    max_norm,
    ema_rests,
    EMA_WARMUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # g = gradient / grad_scale * min(1, max_norm / (norm + floor))
    # m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    # p = (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    # ema += (1 - decay) (p - ema),   copy = p
    block = first + tl.program_id(0).to(tl.int64)
    start = block * BLOCK
    lanes = tl.arange(0, BLOCK)
    count = tl.minimum(length - start, BLOCK).to(tl.int32)
    exists = lanes < count
    p = tl.load(parameter_ptr + start + lanes, mask=exists, other=0.0)
    g = tl.load(gradient_ptr + start + lanes, mask=exists, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_ptr + start + lanes, mask=exists, other=0.0)
    v = tl.load(exp_avg_sq_ptr + start + lanes, mask=exists, other=0.0)

    done = tl.load(step_ptr).to(tl.float32)
    correction1 = _one_minus_power(log1, done + 1.0)
    correction2 = tl.sqrt_rn(_one_minus_power(log2, done + 1.0))
    written = exists
    factor = tl.full([], 1.0, tl.float32)
    if grad_scale_ptr is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale_ptr).to(tl.float32))
    if squared_norm_ptr is not None:
        written = lanes < tl.where(_is_finite(squared_norm_ptr), count, 0)
        if max_norm is not None:
            norm = tl.sqrt_rn(tl.load(squared_norm_ptr).to(tl.float32)) * factor
            factor *= tl.minimum(tl.div_rn(max_norm, norm + CLIP_FLOOR), 1.0)

    lr, weight_decay = lrs[0], weight_decays[0]
    for group in tl.static_range(len(starts)):
        inside = lanes >= tl.minimum(tl.maximum(starts[group] - start, 0), BLOCK).to(tl.int32)
        lr = tl.where(inside, lrs[group + 1], lr)
        weight_decay = tl.where(inside, weight_decays[group + 1], weight_decay)
    if lr_factor_ptr is not None:
        lr *= tl.load(lr_factor_ptr).to(tl.float32)

    g *= factor
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    rate = lr / correction1
    p = (1.0 - lr * weight_decay) * p - rate * m / (tl.sqrt_rn(v) / correction2 + eps)
    tl.store(exp_avg_ptr + start + lanes, m, mask=written)
    tl.store(exp_avg_sq_ptr + start + lanes, v, mask=written)
    tl.store(parameter_ptr + start + lanes, p, mask=written)
    for k in tl.static_range(len(ema_ptrs)):
        rest = ema_rests[k]
        if EMA_WARMUP:  # decay = min(decay, (1 + n) / (10 + n))
            rest = tl.maximum(9.0 / (10.0 + done), rest)
        ema = tl.load(ema_ptrs[k] + start + lanes, mask=exists, other=0.0)
        tl.store(ema_ptrs[k] + start + lanes, ema + rest * (p - ema), mask=written)
    if copy_ptr is not None:
        if key_ptr is not None:
            copy = _stochastic_bfloat16(p, key_ptr, block, BLOCK)
        else:
            copy = p.to(copy_ptr.dtype.element_ty)
        tl.store(copy_ptr + start + lanes, copy, mask=written)


@triton.jit
def _count_kernel(step_ptr, squared_norm_ptr):
    # step = t, where the update was done
    step = tl.load(step_ptr)
    if squared_norm_ptr is not None:
        tl.store(step_ptr, step + _is_finite(squared_norm_ptr).to(step.dtype))
    else:
        tl.store(step_ptr, step + 1)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e3


def adamw_ema_(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    emas: Sequence[torch.Tensor],
    copy: torch.Tensor | None,
    squared_norm: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr_factor: torch.Tensor | None,
    key: torch.Tensor | None,
    starts: Sequence[int],
    lr: Sequence[float],
    weight_decay: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float | None,
    ema_decays: Sequence[float],
    ema_warmup: bool,
) -> None:
    """Launch `fastdistill::adamw_ema_`; the arguments are those of `fastdistill.ops.adamw_ema_`."""
    check_storage(parameter=parameter, gradient=gradient, copy=copy)
    check_storage(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    length = parameter.numel()
    aligned = length - length % _TAIL
    arguments = (
        parameter,
        gradient,
        exp_avg,
        exp_avg_sq,
        step,
        tuple(emas),
        copy,
        squared_norm,
        grad_scale,
        lr_factor,
        None if key is None else key.contiguous(),
    )
    numbers = (
        tuple(starts[1:]),
        tuple(map(float, lr)),
        tuple(map(float, weight_decay)),
        *(float(beta1), 1.0 - beta1, _log(beta1)),
        *(float(beta2), 1.0 - beta2, _log(beta2)),
        float(eps),
        None if max_norm is None else float(max_norm),
        tuple(1.0 - decay for decay in ema_decays),
    )
    options = {"EMA_WARMUP": bool(ema_warmup), "enable_fp_fusion": True}
    with on_device_of(parameter):
        if aligned > 0:
            grid, warps = (triton.cdiv(aligned, _BLOCK),), _THREADS // target().warp_size
            _adamw_kernel[grid](
                *arguments, 0, aligned, *numbers, BLOCK=_BLOCK, num_warps=warps, **options
            )
        if aligned < length:
            _adamw_kernel[(1,)](
                *arguments, aligned // _TAIL, length, *numbers, BLOCK=_TAIL, num_warps=1, **options
            )
        _count_kernel[(1,)](step, squared_norm, num_warps=1)
