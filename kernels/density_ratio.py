"""Weights h(r) of an f-divergence from discriminator logits, for a whole batch in one launch.

One program does everything, going three times over the batch in tiles of samples x bins: bins are
found by comparison, sums have a fixed order, and nothing passes through memory or atomics.

Bytes moved: B (3 heads + 5) numbers and the history, a few kilobytes: the launch is the cost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import check_storage, on_device_of

_MOST_BINS = 1_024
_TILE = 8_192  # samples x bins, or samples x heads: 32 elements a thread
_WARPS = 8


@triton.jit
def _exp(x):
    """e^x = 2^n 2^f, n whole and |f| <= 1/2, where the hardware's 2^f is most accurate."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    f = tl.fma(x, 1.4426950216293335, -n)  # 1 / ln 2 in two parts
    return tl.exp2(tl.fma(x, 1.925963033500e-8, f)) * tl.exp2(n)


@triton.jit
def _power(x, P: tl.constexpr):
    """x^P: products, a square root and a quotient for multiples of 1/2 up to 8."""
    NEGATIVE: tl.constexpr = P < 0
    SIZE: tl.constexpr = -P if NEGATIVE else P
    y = tl.full(x.shape, 1.0, tl.float32)
    if SIZE <= 8 and SIZE % 0.5 == 0:
        for done in tl.static_range(8):
            if done + 1 <= SIZE:
                y *= x
        if SIZE % 1 == 0.5:
            y *= tl.sqrt_rn(x)
    else:
        y = tl.exp2(SIZE * tl.log2(x))
    if NEGATIVE:
        y = tl.div_rn(1.0, y)
    return y


@triton.jit
def _raw_ratio(
    logits_ptr,
    sample,
    exists,
    logit_clamp,
    ratio_min,
    ratio_max,
    K: tl.constexpr,
    HEADS: tl.constexpr,
):
    """clamp(exp(clamp(mean_k l_k))) of each sample of a tile; NaN stays NaN."""
    logit = tl.zeros(sample.shape, tl.float32)
    for first in range(0, K, HEADS):
        head = first + tl.arange(0, HEADS)
        mask = exists[:, None] & (head < K)[None, :]
        tile = tl.load(logits_ptr + sample[:, None] * K + head[None, :], mask=mask, other=0.0)
        logit += tl.sum(tile.to(tl.float32), axis=1)
    nan: tl.constexpr = tl.PropagateNan.ALL
    logit = tl.maximum(logit / K, -logit_clamp, propagate_nan=nan)
    ratio = _exp(tl.minimum(logit, logit_clamp, propagate_nan=nan))
    return tl.minimum(tl.maximum(ratio, ratio_min, propagate_nan=nan), ratio_max, propagate_nan=nan)


@triton.jit
def _members(bin_ptr, sample, exists, bins):
    """Whether each sample of a tile is in each bin."""
    index = tl.load(bin_ptr + sample, mask=exists, other=-1)
    return index[:, None] == bins[None, :]


@triton.jit
def _density_ratio_kernel(
    logits_ptr,
    bin_ptr,
    history_ptr,
    weight_ptr,
    ratio_ptr,
    new_history_ptr,
    batch,
    c0,
    c1,
    decay,
    prior,
    logit_clamp,
    ratio_min,
    ratio_max,
    POWER: tl.constexpr,
    EXPONENT: tl.constexpr,
    K: tl.constexpr,
    BINS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    # S, C = decay (S, C) + (sum of r, number of samples) of each bin
    bins = tl.arange(0, COLUMNS)
    real = bins < BINS
    sums = decay * tl.load(history_ptr + 2 * bins, mask=real, other=0.0)
    counts = decay * tl.load(history_ptr + 2 * bins + 1, mask=real, other=0.0)
    for tile in range(TILES):
        sample = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        exists = sample < batch
        ratio = _raw_ratio(logits_ptr, sample, exists, logit_clamp, ratio_min, ratio_max, K, HEADS)
        member = _members(bin_ptr, sample, exists, bins)
        sums += tl.sum(tl.where(member, ratio[:, None], 0.0), axis=0)
        counts += tl.sum(member.to(tl.float32), axis=0)
    tl.store(new_history_ptr + 2 * bins, sums, mask=real)
    tl.store(new_history_ptr + 2 * bins + 1, counts, mask=real)
    mean = tl.div_rn(sums + prior, counts + prior)

    # r_i = r_i / mean_b;  h_i = r^p (c_0 + c_1 r)^q, then over the mean of h
    total = 0.0
    for normalise in tl.static_range(2):
        for tile in range(TILES):
            sample = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
            exists = sample < batch
            ratio = _raw_ratio(
                logits_ptr, sample, exists, logit_clamp, ratio_min, ratio_max, K, HEADS
            )
            member = _members(bin_ptr, sample, exists, bins)
            own_mean = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1)
            ratio = tl.div_rn(ratio, tl.where(exists, own_mean, 1.0))
            h = _power(ratio, POWER) * _power(c0 + c1 * ratio, EXPONENT)
            if normalise:
                tl.store(weight_ptr + sample, tl.div_rn(h, total / batch), mask=exists)
            else:
                tl.store(ratio_ptr + sample, ratio, mask=exists)
                total += tl.sum(tl.where(exists, h, 0.0))


def density_ratio_weight(
    logits: torch.Tensor,
    bin_index: torch.Tensor,
    history: torch.Tensor,
    power: float,
    c0: float,
    c1: float,
    exponent: float,
    decay: float,
    prior: float,
    logit_clamp: float,
    ratio_min: float,
    ratio_max: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::density_ratio_weight`, as `fastdistill.ops.density_ratio_weight`."""
    check_storage(logits=logits, history=history)
    (batch, heads), bins = logits.shape, history.shape[0]
    if history.dtype != torch.float32 or bins > _MOST_BINS:
        raise ValueError(
            f"history is {history.dtype} with {bins} bins; the Triton kernel needs float32 and at "
            f'most {_MOST_BINS}. Use `with fastdistill.ops.use_backend("reference")` for others'
        )
    weight = history.new_empty(batch)
    ratio, new_history = torch.empty_like(weight), torch.empty_like(history)
    if batch == 0:
        return weight, ratio, decay * history
    columns = triton.next_power_of_2(bins)
    padded_heads = min(triton.next_power_of_2(heads), 1_024)
    rows = min(1_024, _TILE // max(columns, padded_heads))
    with on_device_of(logits):
        _density_ratio_kernel[(1,)](
            logits,
            bin_index.contiguous(),
            history,
            weight,
            ratio,
            new_history,
            batch,
            float(c0),
            float(c1),
            float(decay),
            float(prior),
            float(logit_clamp),
            float(ratio_min),
            float(ratio_max),
            POWER=float(power),
            EXPONENT=float(exponent),
            K=heads,
            BINS=bins,
            HEADS=padded_heads,
            COLUMNS=columns,
            ROWS=rows,
            TILES=triton.cdiv(batch, rows),
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return weight, ratio, new_history
