"""Clip, finite check, AdamW, averages and low-precision copy of a flat range, in one launch.

A length that is a multiple of 16, as arenas have, keeps 128-bit accesses under a mask and is one
launch; of another length the last block of 256 is a launch of its own, before. A program walks over
up to 8 neighbouring blocks. Nothing is compiled anew for another length, learning rate, step or
division into ranges: numbers are arguments, and those that the host must form in float64 (1 - beta,
ln beta, 1 - decay) come from there.

The last program to arrive counts the step up: a program takes its ticket after all its threads have
read `step`, so that no other program can still read what the last one writes. The ticket is taken
with acq_rel, which orders those reads before the write, and is zero again for the next launch.

Where a range has several groups of parameters, a table on the device says where each group's ranges
begin. A program finds its first range by bisection and walks on from there.

Bytes moved, float32 state: parameter, moments and each EMA read and written once, the gradient read
once, the copy written once: 38 bytes a parameter with float32 gradients, one EMA and a bfloat16
copy, 22 + 8 for each further EMA. Moments of 8 bits take 12 of those bytes away and add 1/16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastdistill.kernels._moments import load_moment, store_moment
from fastdistill.kernels._sample import arrive_last, check_storage, on_device_of, target
from fastdistill.kernels.noise import in_order, words

CLIP_FLOOR = tl.constexpr(1e-6)
_BLOCK, _THREADS = 1_024, 128  # 8 elements a thread: 128 bits of the narrowest float
_TAIL = 256  # a block of 8-bit moments, which no two launches may share
_MOST_BLOCKS, _PROGRAMS = 8, 2_048  # of one program; fewer while programs are fewer than these
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
def _random_words(key_ptr, block, BLOCK: tl.constexpr):
    """A random uint32 for each element of a block of the flat range."""
    w0, w1, w2, w3 = words(key_ptr, block // (_SAMPLE // BLOCK), block, BLOCK)
    return in_order(w0, w1, w2, w3, BLOCK)


@triton.jit
def _stochastic_bfloat16(value, word):
    """bfloat16(bits + w), w < 2^16 random, with the low 16 bits cut; inf and NaN stay."""
    bits = value.to(tl.uint32, bitcast=True) + (word >> 16)
    rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), rounded, value).to(tl.bfloat16)


@triton.jit
def _of_group(values, group):
    found = values[0]
    for k in tl.static_range(1, len(values)):
        found = tl.where(group == k, values[k], found)
    return found


@triton.jit
def _rate_and_decay(lrs, weight_decays, group, lr_factor, correction1):
    """lr / (1 - beta1^t) and 1 - lr wd of a group."""
    lr = lr_factor * _of_group(lrs, group)
    return lr / correction1, 1.0 - lr * _of_group(weight_decays, group)


@triton.jit
def _find_range(ranges_ptr, ranges, element):
    """The last range that begins at or before an element."""
    low = tl.full([], 0, tl.int64)
    high = low + ranges
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(ranges_ptr + 2 * middle) <= element
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _rates_of_block(
    ranges_ptr, place, start, lrs, weight_decays, lr_factor, correction1, BLOCK: tl.constexpr
):
    """Rate and decay of each element, and the range of the last one; `place` is at the first's."""
    lanes = tl.arange(0, BLOCK)
    group = tl.load(ranges_ptr + 2 * place + 1)
    rate, decay = _rate_and_decay(lrs, weight_decays, group, lr_factor, correction1)
    rates, decays = tl.zeros([BLOCK], tl.float32) + rate, tl.zeros([BLOCK], tl.float32) + decay
    begin = tl.load(ranges_ptr + 2 * place + 2)
    while begin < start + BLOCK:
        place += 1
        group = tl.load(ranges_ptr + 2 * place + 1)
        rate, decay = _rate_and_decay(lrs, weight_decays, group, lr_factor, correction1)
        inside = lanes >= (begin - start).to(tl.int32)
        rates, decays = tl.where(inside, rate, rates), tl.where(inside, decay, decays)
        begin = tl.load(ranges_ptr + 2 * place + 2)
    return rates, decays, place


@triton.jit
def _count(step_ptr, counters_ptr, finite):
    # step = t where the update was done, else one more update that was not
    if arrive_last(counters_ptr + 1):
        if finite:
            tl.store(step_ptr, tl.load(step_ptr) + 1)
        else:
            tl.store(counters_ptr, tl.load(counters_ptr) + 1)


@triton.jit(do_not_specialize=["first", "blocks", "ranges"])
def _adamw_kernel(
    parameter_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,
    ema_ptrs,
    copy_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_scale_ptr,
    counters_ptr,
    squared_norm_ptr,
    grad_scale_ptr,
    lr_factor_ptr,
    key_ptr,
    moment_key_ptr,
    ranges_ptr,
    first,
    blocks,
    length,
    ranges,
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
    done = tl.load(step_ptr).to(tl.float32)
    correction1 = _one_minus_power(log1, done + 1.0)
    correction2 = tl.sqrt_rn(_one_minus_power(log2, done + 1.0))
    finite = tl.full([], 1, tl.int1)
    factor = tl.full([], 1.0, tl.float32)
    if grad_scale_ptr is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale_ptr).to(tl.float32))
    if squared_norm_ptr is not None:
        finite = _is_finite(squared_norm_ptr)
        if max_norm is not None:
            norm = tl.sqrt_rn(tl.load(squared_norm_ptr).to(tl.float32)) * factor
            factor *= tl.minimum(tl.div_rn(max_norm, norm + CLIP_FLOOR), 1.0)
    lr_factor = tl.full([], 1.0, tl.float32)
    if lr_factor_ptr is not None:
        lr_factor = tl.load(lr_factor_ptr).to(tl.float32)

    lanes = tl.arange(0, BLOCK)
    block = first + tl.program_id(0).to(tl.int64) * blocks
    end = tl.minimum(block + blocks, tl.cdiv(length, BLOCK))
    if ranges_ptr is not None:
        place = _find_range(ranges_ptr, ranges, block * BLOCK)
    else:
        rate, decay = _rate_and_decay(lrs, weight_decays, 0, lr_factor, correction1)
    while block < end:
        start = block * BLOCK
        count = tl.minimum(length - start, BLOCK).to(tl.int32)
        kept = tl.where(finite, count, 0)
        exists, written = lanes < count, lanes < kept
        p = tl.load(parameter_ptr + start + lanes, mask=exists, other=0.0)
        g = tl.load(gradient_ptr + start + lanes, mask=exists, other=0.0).to(tl.float32) * factor
        if moment_key_ptr is not None:
            m = load_moment(exp_avg_ptr, exp_avg_scale_ptr, start, count, True, BLOCK)
            v = load_moment(exp_avg_sq_ptr, exp_avg_sq_scale_ptr, start, count, False, BLOCK)
        else:
            m = tl.load(exp_avg_ptr + start + lanes, mask=exists, other=0.0)
            v = tl.load(exp_avg_sq_ptr + start + lanes, mask=exists, other=0.0)
        if ranges_ptr is not None:
            rate, decay, place = _rates_of_block(
                ranges_ptr, place, start, lrs, weight_decays, lr_factor, correction1, BLOCK
            )

        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        p = decay * p - rate * m / (tl.sqrt_rn(v) / correction2 + eps)
        if moment_key_ptr is not None:
            word = _random_words(moment_key_ptr, block, BLOCK)
            high, low = word >> 16 << 4, (word & 0xFFFF) << 4
            store_moment(m, high, exp_avg_ptr, exp_avg_scale_ptr, start, kept, True, BLOCK)
            store_moment(v, low, exp_avg_sq_ptr, exp_avg_sq_scale_ptr, start, kept, False, BLOCK)
        else:
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
                copy = _stochastic_bfloat16(p, _random_words(key_ptr, block, BLOCK))
            else:
                copy = p.to(copy_ptr.dtype.element_ty)
            tl.store(copy_ptr + start + lanes, copy, mask=written)
        block += 1

    if counters_ptr is not None:
        _count(step_ptr, counters_ptr, finite)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e3


@functools.cache
def _table(starts: tuple[int, ...], groups: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(start, group) of each range and a start past all ends; kept, as captured graphs read it."""
    rows = [*zip(starts, groups, strict=True), (2**62, 0)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def adamw_ema_(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    emas: Sequence[torch.Tensor],
    copy: torch.Tensor | None,
    exp_avg_scale: torch.Tensor | None,
    exp_avg_sq_scale: torch.Tensor | None,
    counters: torch.Tensor | None,
    squared_norm: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr_factor: torch.Tensor | None,
    key: torch.Tensor | None,
    moment_key: torch.Tensor | None,
    starts: Sequence[int],
    groups: Sequence[int],
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
    if moment_key is None:
        check_storage(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    length = parameter.numel()
    aligned = length if length % 16 == 0 else length - length % _TAIL
    blocks = min(max(triton.cdiv(aligned, _BLOCK) // _PROGRAMS, 1), _MOST_BLOCKS)
    rates, decays, table = tuple(map(float, lr)), tuple(map(float, weight_decay)), None
    with on_device_of(parameter):
        if len(starts) == 1:
            rates, decays = (rates[groups[0]],), (decays[groups[0]],)
        else:
            table = _table(tuple(starts), tuple(groups), parameter.device)
        if counters is None:
            counters = torch.zeros(2, dtype=torch.int32, device=parameter.device)
        state = (parameter, gradient, exp_avg, exp_avg_sq, step, tuple(emas), copy)
        state = (*state, exp_avg_scale, exp_avg_sq_scale)
        scalars = (squared_norm, grad_scale, lr_factor)
        keys = (None if value is None else value.contiguous() for value in (key, moment_key))
        scalars = (*scalars, *keys, table)
        numbers = (
            len(starts),
            rates,
            decays,
            *(float(beta1), 1.0 - beta1, _log(beta1)),
            *(float(beta2), 1.0 - beta2, _log(beta2)),
            float(eps),
            None if max_norm is None else float(max_norm),
            tuple(1.0 - decay for decay in ema_decays),
        )
        options = {"EMA_WARMUP": bool(ema_warmup), "enable_fp_fusion": True}
        if aligned < length:
            place = (aligned // _TAIL, 1, length)
            _adamw_kernel[(1,)](
                *state, None, *scalars, *place, *numbers, BLOCK=_TAIL, num_warps=1, **options
            )
        warps = _THREADS // target().warp_size
        _adamw_kernel[(max(triton.cdiv(aligned, _BLOCK * blocks), 1),)](
            *(*state, counters, *scalars, 0, blocks, aligned, *numbers),
            **options,
            BLOCK=_BLOCK,
            num_warps=warps,
        )
