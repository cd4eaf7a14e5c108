"""8-bit moments of AdamW: a scale for each 256 elements, and codes that are float32 cut short.

Of each block of 256 consecutive elements, s = max |x| (1 where all are 0) and r = |x| / s. The
bits of a float32 grow with it, linearly within an octave; a code is their distance from those of
r = 1 in steps of 2^20, an eighth of an octave:

    step = floor((bits(r) + w) / 2^20) - bits(1) / 2^20,    0 <= w < 2^20
    signed (exp_avg):       127 + step and the sign in the top bit;  0 where that is below 1
    unsigned (exp_avg_sq):  255 + step, at least 1;                   0 where x = 0
    |x| = s * float32 with the bits of r = 1 plus 2^20 step;          0 where the code is 0

Signed codes reach down to s / 2^15.75, unsigned ones to s / 2^31.75. With w random the value that
is stored has the expectation x: a second moment moves by 1 - beta2 = 0.001 of itself an update, and
rounding to the nearest code, 6 to 12 percent apart, would never let it move.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOMENT_BLOCK = 256
_NEAREST = 1 << 19
_ONE = 0x3F800000 >> 20  # bits of 1.0 in steps of 2^20


def _largest(value: Tensor) -> Tensor:
    """The largest number of each block  # [ceil(n / 256)]"""
    flat = value.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % MOMENT_BLOCK))
    return padded.view(-1, MOMENT_BLOCK).amax(dim=1)


def _of_each_element(scale: Tensor, like: Tensor) -> Tensor:
    """The scale of each element's block."""
    return scale.repeat_interleave(MOMENT_BLOCK)[: like.numel()].view(like.shape)


def quantise_moment(
    value: Tensor, *, signed: bool, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """8-bit codes of a moment and the scales of its blocks; `dequantise_moment` takes them back.

    Args:
        value: exp_avg (signed) or exp_avg_sq (not negative), floating, of any shape.
        signed: whether codes have a sign.
        noise: int32 of the shape of ``value`` in [0, 2^20), what is added before bits are cut off:
            uniform to round stochastically. Without it values are rounded to the nearest code.

    Returns:
        Codes, uint8 of the shape of ``value``, and scales, float32 [ceil(n / 256)].

    Raises:
        ValueError: if ``noise`` has another shape.
    """
    if noise is not None and noise.shape != value.shape:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; expected {tuple(value.shape)}, as value has"
        )
    size = value.float().abs()
    scale = _largest(size)
    scale = torch.where(scale == 0, 1.0, scale)
    ratio = size / _of_each_element(scale, size)
    bits = ratio.view(torch.int32) + (_NEAREST if noise is None else noise)
    step = (bits >> 20) - _ONE
    if signed:
        code = 127 + step + 128 * value.signbit()
        code = torch.where(127 + step > 0, code, 0)
    else:
        code = torch.where(value == 0, 0, (255 + step).clamp(min=1))
    return code.to(torch.uint8), scale


def dequantise_moment(code: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """The moment that codes stand for, float32.

    Args:
        code: uint8 of any shape, as `quantise_moment` and `adamw_ema_` write it.
        scale: float32 [ceil(n / 256)].
        signed: whether codes have a sign: that of exp_avg has, that of exp_avg_sq has none.

    Raises:
        ValueError: for tensors of another form.
    """
    blocks = -(-code.numel() // MOMENT_BLOCK)
    if code.dtype != torch.uint8 or scale.dtype != torch.float32 or scale.shape != (blocks,):
        raise ValueError(
            f"code is {code.dtype} with {code.numel()} elements and scale {scale.dtype} of shape "
            f"{tuple(scale.shape)}; expected uint8 and float32 ({blocks},), one for each "
            f"{MOMENT_BLOCK} elements"
        )
    wide = code.to(torch.int32)
    size = wide & 127 if signed else wide
    level = ((size - (127 if signed else 255) + _ONE) << 20).view(torch.float32)
    level = torch.where(size == 0, 0.0, level)
    if signed:
        level = torch.where(wide > 127, -level, level)
    return level * _of_each_element(scale, level)
