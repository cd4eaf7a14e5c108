"""The codec of 8-bit moments, as `fastdistill/ops/_moments.py` states it.

A thread has eight neighbours, so that it reads and writes 8 bytes of codes, and a warp of 32 has a
block of 256: its maximum needs no shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOMENT_BLOCK = tl.constexpr(256)
_ONE = tl.constexpr(0x3F800000 >> 20)  # bits of 1.0 in steps of 2^20


@triton.jit
def _top(SIGNED: tl.constexpr):
    return 127 if SIGNED else 255


@triton.jit
def _of_each_element(scale, BLOCK: tl.constexpr):
    """[BLOCK] from the numbers of its blocks of 256."""
    return tl.broadcast_to(scale[:, None], [BLOCK // MOMENT_BLOCK, MOMENT_BLOCK]).reshape([BLOCK])


@triton.jit
def load_moment(code_ptr, scale_ptr, start, count, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The first ``count`` moments of the block that begins at ``start``, and zeros."""
    lanes = tl.arange(0, BLOCK)
    code = tl.load(code_ptr + start + lanes, mask=lanes < count, other=0).to(tl.int32)
    block = tl.arange(0, BLOCK // MOMENT_BLOCK)
    exists = block * MOMENT_BLOCK < count
    scale = tl.load(scale_ptr + start // MOMENT_BLOCK + block, mask=exists, other=1.0)
    size = code & 127 if SIGNED else code
    bits = (size + (_ONE - _top(SIGNED))) << 20
    if SIGNED:
        bits |= (code & 128) << 24
    level = tl.where(size > 0, bits.to(tl.float32, bitcast=True), 0.0)
    return level * _of_each_element(scale, BLOCK)


@triton.jit
def store_moment(
    value, noise, code_ptr, scale_ptr, start, count, SIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the first ``count`` elements of ``value``, rounded by ``noise`` < 2^20."""
    lanes = tl.arange(0, BLOCK)
    BLOCKS: tl.constexpr = BLOCK // MOMENT_BLOCK
    scale = tl.max(tl.abs(value).reshape([BLOCKS, MOMENT_BLOCK]), axis=1)
    scale = tl.where(scale == 0.0, 1.0, scale)
    ratio = tl.div_rn(tl.abs(value), _of_each_element(scale, BLOCK))
    step = ((ratio.to(tl.int32, bitcast=True) + noise.to(tl.int32)) >> 20) - _ONE
    code = step + _top(SIGNED)
    if SIGNED:
        sign = (value.to(tl.uint32, bitcast=True) >> 31 << 7).to(tl.int32)
        code = tl.where(code > 0, code | sign, 0)
    else:
        code = tl.where(value == 0.0, 0, tl.maximum(code, 1))
    block = tl.arange(0, BLOCKS)
    tl.store(code_ptr + start + lanes, code.to(tl.uint8), mask=lanes < count)
    exists = block * MOMENT_BLOCK < count
    tl.store(scale_ptr + start // MOMENT_BLOCK + block, scale, mask=exists)
