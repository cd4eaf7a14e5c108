"""Group norm and SiLU, forward and backward, for contiguous and channels-last memory alike.

A sample is a matrix of C channels and S places, one of which is contiguous; a program has a tile
of it whose long side lies along memory. The first launch leaves each tile's sums of each channel,
the second adds them up, one program a group, the third computes the result of each tile. There are
no atomics: every sum has a fixed order. Variances are sums of squares around a mean, first the
tile's, then the group's.

Bytes moved: forward x twice and y once; backward x and dy twice, dx once, y where it is asked for.
Beside them 8 bytes (backward 12) a channel and tile.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import check_storage, on_device_of

_TILE = 4_096
_LAST_CHANNELS = 64  # of a channels-last tile: whole 128-byte lines of 16-bit numbers
_STEPS = 4  # tiles of places that a program of the first launch takes in turn, channels last
_MANY_PLACES = 4_096
_PARTIALS = 4_096  # partial sums that a program of the second launch holds at once


@triton.jit
def _locate(
    C: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Sample, part and first channel of this program."""
    CHANNEL_PARTS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    PARTS: tl.constexpr = (S + PLACES * STEPS - 1) // (PLACES * STEPS)
    program = tl.program_id(0)
    part = program // CHANNEL_PARTS % PARTS
    sample = (program // (CHANNEL_PARTS * PARTS)).to(tl.int64)
    return sample, part, program % CHANNEL_PARTS * CHANNELS


@triton.jit
def _offsets(
    sample, channel, place, C: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
    PLACES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Where the tile [CHANNELS, PLACES] from this channel and place lies, and what of it exists."""
    lane, along = tl.arange(0, CHANNELS)[:, None], tl.arange(0, PLACES)[None, :]
    exists = (lane < C - channel) & (along < S - place)
    start = sample * (C * S)
    if LAST:
        return start + place.to(tl.int64) * C + channel, along * C + lane, exists
    return start + channel.to(tl.int64) * S + place, lane * S + along, exists


@triton.jit
def _of_channels(pointer, offset, channel, real):
    """A number of each channel in float32  # [CHANNELS, 1]"""
    value = tl.load(pointer + offset + channel.to(tl.int64), mask=real, other=0.0)
    return value.to(tl.float32)[:, None]


@triton.jit
def _centre_and_scale(
    mean_ptr, rstd_ptr, shift_ptr, sample, channel, real, C: tl.constexpr, GROUPS: tl.constexpr
):
    """m and r of each channel such that n = (x - m) r  # [CHANNELS, 1] each"""
    group = channel // (C // GROUPS)
    centre = _of_channels(mean_ptr, sample * GROUPS, group, real)
    if shift_ptr is not None:
        centre -= _of_channels(shift_ptr, sample * C, channel, real)
    return centre, _of_channels(rstd_ptr, sample * GROUPS, group, real)


@triton.jit(do_not_specialize=["batch"])
def _moments_kernel(
    x_ptr, partial_ptr, batch, C: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr,
    PLACES: tl.constexpr, STEPS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # mean and sum of (x - mean)^2 of each channel over the places of this program; tiles are merged
    # by their counts n and k:  mean += delta k / (n + k),  M2 += M2' + delta^2 n k / (n + k)
    sample, part, channel = _locate(C, S, CHANNELS, PLACES, STEPS)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    PARTS: tl.constexpr = (S + PLACES * STEPS - 1) // (PLACES * STEPS)
    count = 0.0
    for step in tl.static_range(STEPS):
        first = (part * STEPS + step) * PLACES
        start, offset, exists = _offsets(sample, channel, first, C, S, CHANNELS, PLACES, LAST)
        x = tl.load(x_ptr + start + offset, mask=exists, other=0.0).to(tl.float32)
        here = tl.minimum(tl.maximum(S - first, 0), PLACES).to(tl.float32)
        tile_mean = tl.sum(x, axis=1) / tl.maximum(here, 1.0)
        centred = tl.where(exists, x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        share = here / tl.maximum(count + here, 1.0)
        mean += delta * share
        squares += tl.sum(centred * centred, axis=1) + delta * delta * (count * share)
        count += here
    row = (sample * PARTS + part) * C + channel
    size = tl.full([], PARTS * C, tl.int64) * batch
    lane = tl.arange(0, CHANNELS)
    tl.store(partial_ptr + row + lane, mean, mask=lane < C - channel)
    tl.store(partial_ptr + size + row + lane, squares, mask=lane < C - channel)


@triton.jit(do_not_specialize=["batch"])
def _statistics_kernel(
    partial_ptr, shift_ptr, mean_ptr, rstd_ptr, batch, eps,
    C: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr, PER_PART: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # mean = sum_i n_i mean_i / L,   var = sum_i [M2_i + n_i (mean_i - mean)^2] / L
    program = tl.program_id(0)
    sample, group = (program // GROUPS).to(tl.int64), program % GROUPS
    column = tl.arange(0, COLUMNS)
    channel, real = group * (C // GROUPS) + column, column < C // GROUPS
    squares_ptr = partial_ptr + tl.full([], PARTS * C, tl.int64) * batch
    shift = tl.zeros([1, COLUMNS], tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + sample * C + channel, mask=real, other=0.0)
        shift = shift.to(tl.float32)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, PARTS, ROWS):
        part = first + tl.arange(0, ROWS)
        exists = (part < PARTS)[:, None] & real[None, :]
        offset = (sample * PARTS + part)[:, None] * C + channel[None, :]
        count = tl.minimum(S - part * PER_PART, PER_PART).to(tl.float32)[:, None]
        value = tl.load(partial_ptr + offset, mask=exists, other=0.0) + shift
        total += tl.where(exists, count * value, 0.0)
    mean = tl.sum(total) / (S * (C // GROUPS))
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, PARTS, ROWS):
        part = first + tl.arange(0, ROWS)
        exists = (part < PARTS)[:, None] & real[None, :]
        offset = (sample * PARTS + part)[:, None] * C + channel[None, :]
        count = tl.minimum(S - part * PER_PART, PER_PART).to(tl.float32)[:, None]
        delta = tl.load(partial_ptr + offset, mask=exists, other=0.0) + shift - mean
        squares = tl.load(squares_ptr + offset, mask=exists, other=0.0)
        total += tl.where(exists, squares + count * delta * delta, 0.0)
    var = tl.sum(total) / (S * (C // GROUPS))
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, 1.0 / tl.sqrt(var + eps))


@triton.jit
def _apply_kernel(
    x_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, out_ptr,
    C: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, PLACES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # y = silu(u),   u = weight n + bias,   n = (x + shift - mean) rstd
    sample, part, first = _locate(C, S, CHANNELS, PLACES, 1)
    start, offset, exists = _offsets(sample, first, part * PLACES, C, S, CHANNELS, PLACES, LAST)
    channel = first + tl.arange(0, CHANNELS)
    real = channel < C
    x = tl.load(x_ptr + start + offset, mask=exists, other=0.0).to(tl.float32)
    centre, scale = _centre_and_scale(
        mean_ptr, rstd_ptr, shift_ptr, sample, channel, real, C, GROUPS
    )
    weight = _of_channels(weight_ptr, 0, channel, real)
    u = (x - centre) * scale * weight + _of_channels(bias_ptr, 0, channel, real)
    if SILU:
        u *= tl.sigmoid(u)
    tl.store(out_ptr + start + offset, u.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _silu_slope(u):
    # silu'(u) = sigma (1 + u (1 - sigma)),   sigma = sigmoid(u)
    sigma = tl.sigmoid(u)
    return sigma * (1.0 + u * (1.0 - sigma))


@triton.jit(do_not_specialize=["batch"])
def _gradient_sums_kernel(
    grad_ptr, x_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, partial_ptr, batch,
    C: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, PLACES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # of each channel over the places of this program: sums of du, of du n, and of n with a shift
    sample, part, first = _locate(C, S, CHANNELS, PLACES, 1)
    start, offset, exists = _offsets(sample, first, part * PLACES, C, S, CHANNELS, PLACES, LAST)
    channel = first + tl.arange(0, CHANNELS)
    real = channel < C
    x = tl.load(x_ptr + start + offset, mask=exists, other=0.0).to(tl.float32)
    du = tl.load(grad_ptr + start + offset, mask=exists, other=0.0).to(tl.float32)
    centre, scale = _centre_and_scale(
        mean_ptr, rstd_ptr, shift_ptr, sample, channel, real, C, GROUPS
    )
    n = (x - centre) * scale
    if SILU:
        weight = _of_channels(weight_ptr, 0, channel, real)
        du *= _silu_slope(weight * n + _of_channels(bias_ptr, 0, channel, real))
    PARTS: tl.constexpr = (S + PLACES - 1) // PLACES
    row = (sample * PARTS + part) * C + channel
    size = tl.full([], PARTS * C, tl.int64) * batch
    tl.store(partial_ptr + row, tl.sum(du, axis=1), mask=real)
    tl.store(partial_ptr + size + row, tl.sum(du * n, axis=1), mask=real)
    if shift_ptr is not None:
        n = tl.where(exists, n, 0.0)
        tl.store(partial_ptr + 2 * size + row, tl.sum(n, axis=1), mask=real)


@triton.jit
def _add_parts(
    pointer, sample, channel, real, C: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over the parts of a sample  # [COLUMNS]"""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, PARTS, ROWS):
        part = first + tl.arange(0, ROWS)
        exists = (part < PARTS)[:, None] & real[None, :]
        offset = (sample * PARTS + part)[:, None] * C + channel[None, :]
        total += tl.load(pointer + offset, mask=exists, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["batch"])
def _reduce_kernel(
    partial_ptr, weight_ptr, rstd_ptr, sums_ptr, group_means_ptr, shift_grad_ptr, batch,
    C: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # of each channel the sums of du and of du n; of the group the means of weight du and of
    # weight du n; dshift = rstd (weight sum(du) - S mean(weight du) - sum(n) mean(weight du n))
    program = tl.program_id(0)
    sample, group = (program // GROUPS).to(tl.int64), program % GROUPS
    column = tl.arange(0, COLUMNS)
    channel, real = group * (C // GROUPS) + column, column < C // GROUPS
    size = tl.full([], PARTS * C, tl.int64) * batch
    of_du = _add_parts(partial_ptr, sample, channel, real, C, PARTS, ROWS, COLUMNS)
    of_du_n = _add_parts(partial_ptr + size, sample, channel, real, C, PARTS, ROWS, COLUMNS)
    row = sums_ptr + sample * C + channel
    tl.store(row, of_du, mask=real)
    tl.store(row + tl.full([], C, tl.int64) * batch, of_du_n, mask=real)
    weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(weight * of_du) / (S * (C // GROUPS))
    along_n = tl.sum(weight * of_du_n) / (S * (C // GROUPS))
    tl.store(group_means_ptr + program, mean)
    tl.store(group_means_ptr + batch * GROUPS + program, along_n)
    if shift_grad_ptr is not None:
        of_n = _add_parts(partial_ptr + 2 * size, sample, channel, real, C, PARTS, ROWS, COLUMNS)
        grad = tl.load(rstd_ptr + program) * (weight * of_du - S * mean - of_n * along_n)
        pointer = shift_grad_ptr + sample * C + channel
        tl.store(pointer, grad.to(shift_grad_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["batch"])
def _gradient_kernel(
    grad_ptr, x_ptr, shift_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, group_means_ptr,
    grad_x_ptr, again_ptr, batch, C: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # dx = rstd (weight du - mean(weight du) - n mean(weight du n)),   y = silu(u)
    sample, part, first = _locate(C, S, CHANNELS, PLACES, 1)
    start, offset, exists = _offsets(sample, first, part * PLACES, C, S, CHANNELS, PLACES, LAST)
    channel = first + tl.arange(0, CHANNELS)
    real = channel < C
    x = tl.load(x_ptr + start + offset, mask=exists, other=0.0).to(tl.float32)
    du = tl.load(grad_ptr + start + offset, mask=exists, other=0.0).to(tl.float32)
    centre, scale = _centre_and_scale(
        mean_ptr, rstd_ptr, shift_ptr, sample, channel, real, C, GROUPS
    )
    group = channel // (C // GROUPS)
    mean = _of_channels(group_means_ptr, sample * GROUPS, group, real)
    second = (sample + batch) * GROUPS
    along_n = _of_channels(group_means_ptr, second, group, real)
    weight = _of_channels(weight_ptr, 0, channel, real)
    n = (x - centre) * scale
    u = weight * n + _of_channels(bias_ptr, 0, channel, real)
    if again_ptr is not None:
        y = u * tl.sigmoid(u) if SILU else u
        tl.store(again_ptr + start + offset, y.to(again_ptr.dtype.element_ty), mask=exists)
    if SILU:
        du *= _silu_slope(u)
    dx = scale * (weight * du - mean - n * along_n)
    tl.store(grad_x_ptr + start + offset, dx.to(grad_x_ptr.dtype.element_ty), mask=exists)


@functools.cache
def _tile(channels: int, places: int, last: bool) -> dict[str, Any]:
    """Constants of the kernels that have a tile, and their launch options."""
    if channels * places >= 2**31:
        raise ValueError(f"a sample has {channels * places} elements; kernels take {2**31 - 1}")
    if last:
        wide = min(_LAST_CHANNELS, max(16, triton.next_power_of_2(channels)))
        tile = {"CHANNELS": wide, "PLACES": _TILE // wide}
    else:
        wide = min(_TILE, max(16, triton.next_power_of_2(places)))
        tile = {"CHANNELS": min(_TILE // wide, triton.next_power_of_2(channels)), "PLACES": wide}
    warps = max(1, math.prod(tile.values()) // 512)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return {"C": channels, "S": places, "LAST": last, **tile, **options}


def _programs(tile: dict[str, Any], steps: int = 1) -> tuple[int, int]:
    """Parts that the places of a sample are divided into, and programs a sample."""
    parts = triton.cdiv(tile["S"], tile["PLACES"] * steps)
    return parts, parts * triton.cdiv(tile["C"], tile["CHANNELS"])


def _adding(channels: int, groups: int, parts: int) -> dict[str, Any]:
    """Tile of partial sums [ROWS, COLUMNS] of the kernels that add up those of a group."""
    columns = triton.next_power_of_2(channels // groups)
    rows = min(triton.next_power_of_2(parts), max(1, _PARTIALS // columns))
    warps = min(8, max(1, rows * columns // 512))
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return {"PARTS": parts, "ROWS": rows, "COLUMNS": columns, **options}


def _shape(x: torch.Tensor) -> tuple[int, int, int, bool]:
    """Batch, channels, places, and whether the channels are last in memory."""
    return x.shape[0], x.shape[1], x.shape[2:].numel(), not x.is_contiguous()


def _flat(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``value``, which lies as ``x`` does, seen as contiguous."""
    return value.movedim(1, -1) if _shape(x)[3] else value


def group_norm_silu(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::group_norm_silu`, as `fastdistill.ops.group_norm_silu`."""
    check_storage(x=_flat(x, x), shift=shift, weight=weight, bias=bias)
    batch, channels, places, last = _shape(x)
    out = torch.empty_like(x)
    mean, rstd = (x.new_empty(batch, groups, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return out, mean, rstd
    tile = _tile(channels, places, last)
    steps = _STEPS if last and places >= _MANY_PLACES else 1
    parts, programs = _programs(tile, steps)
    partial = x.new_empty(2, batch, parts, channels, dtype=torch.float32)
    with on_device_of(x):
        _moments_kernel[(batch * programs,)](x, partial, batch, STEPS=steps, **tile)
        _statistics_kernel[(batch * groups,)](
            *(partial, shift, mean, rstd, batch, eps, channels, places, groups),
            PER_PART=tile["PLACES"] * steps,
            **_adding(channels, groups, parts),
        )
        _apply_kernel[(batch * _programs(tile)[1],)](
            *(x, shift, weight, bias, mean, rstd, out), GROUPS=groups, SILU=silu, **tile
        )
    return out, mean, rstd


def group_norm_silu_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    silu: bool,
    value: bool,
) -> tuple[torch.Tensor, ...]:
    """Launch `fastdistill::group_norm_silu_backward`; arguments as its reference's."""
    check_storage(grad=_flat(grad, x), x=_flat(x, x), shift=shift, weight=weight, bias=bias)
    batch, channels, places, last = _shape(x)
    grad_x, none = torch.empty_like(x), x.new_empty(batch, 0)
    again = torch.empty_like(x) if value else none
    grad_shift = none if shift is None else torch.empty_like(shift)
    if x.numel() == 0:
        return grad_x, grad_shift, torch.zeros_like(weight), torch.zeros_like(bias), again
    tile = _tile(channels, places, last)
    parts, programs = _programs(tile)
    partial = x.new_empty(2 if shift is None else 3, batch, parts, channels, dtype=torch.float32)
    sums = x.new_empty(2, batch, channels, dtype=torch.float32)
    means = x.new_empty(2, batch, groups, dtype=torch.float32)
    normed = (grad, x, shift, weight, bias, mean, rstd)
    with on_device_of(x):
        _gradient_sums_kernel[(batch * programs,)](
            *normed, partial, batch, GROUPS=groups, SILU=silu, **tile
        )
        _reduce_kernel[(batch * groups,)](
            *(partial, weight, rstd, sums, means, None if shift is None else grad_shift, batch),
            *(channels, places, groups),
            **_adding(channels, groups, parts),
        )
        _gradient_kernel[(batch * programs,)](
            *(*normed, means, grad_x, again if value else None, batch),
            GROUPS=groups, SILU=silu, **tile,
        )  # fmt: skip
    grad_bias, grad_weight = sums.sum(1)
    return grad_x, grad_shift, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), again
