"""Counter-based normals and uniforms: Philox-4x32-10 and Box-Muller, as in `ops/noise.py`.

A thread turns one Philox call into four consecutive elements, so that no word is wasted and stores
are 128 bits wide. Uniforms are bitwise the reference's; normals are within 1e-6 of its float64:
logarithm, sine and cosine are polynomials of our own on exactly reduced arguments, since the
hardware's approximations are not accurate where u is near 1.

Bytes moved: the output, once. The key is read from the device, so that a CUDA graph can move on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import check_storage, cut, locate, on_device_of

# About 40 instructions an element: enough work for a program of 2,048 elements.
NOISE_BLOCK = 2_048


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32 with ten rounds on uint32 words."""
    for _ in tl.static_range(10):
        # A widening multiplication is one instruction; umulhi and a low product are two.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(key_ptr, sample, part, BLOCK: tl.constexpr):
    """Four uint32 words [BLOCK / 4] for each four elements of block ``part`` of a sample."""
    seed = tl.load(key_ptr)
    stream = tl.load(key_ptr + 1).to(tl.uint32)
    step = tl.load(key_ptr + 2).to(tl.uint32)
    counter = (part * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return philox(counter, sample.to(tl.uint32), step, stream, low, high)


@triton.jit
def in_order(v0, v1, v2, v3, BLOCK: tl.constexpr):
    """[BLOCK] with elements 4 k + j = v_j[k], which stay in the thread that made them."""
    return tl.join(tl.join(v0, v2), tl.join(v1, v3)).reshape([BLOCK])


@triton.jit
def log_fraction(w):
    """ln(w / 2^32) for float32 w in [1/2, 2^32], to 1 ulp, relative also where it is near 0."""
    # w = 2^e (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), and ln(1 + f) = f - f^2 / 2 + f^3 p(f)
    bits = w.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, -0.07634493, 0.12761576)
    p = tl.fma(f, p, -0.13160183)
    p = tl.fma(f, p, 0.14201758)
    p = tl.fma(f, p, -0.16623357)
    p = tl.fma(f, p, 0.20001227)
    p = tl.fma(f, p, -0.25000821)
    p = tl.fma(f, p, 0.33333332)
    e = (e - 32).to(tl.float32)
    tail = tl.fma(e, -2.12194440e-4, f * f * tl.fma(f, p, -0.5))
    return tl.fma(e, 0.693359375, f + tail)  # ln 2 = 0.693359375 - 2.12194440e-4, e exact


@triton.jit
def cos_sin_turn(w):
    """Cosine and sine of 2 pi w / 2^32 for uint32 w."""
    # w = quarter 2^30 + rest with |rest| <= 2^29: an exact reduction to [-pi / 4, pi / 4]
    quarter = (w + 0x20000000) >> 30
    rest = (w - (quarter << 30)).to(tl.int32, bitcast=True)
    x = rest.to(tl.float32) * 1.4629180792671596e-9  # 2 pi / 2^32
    z = x * x
    sin = tl.fma(tl.fma(z, -0.00019515, 0.00833216), z, -0.16666655)
    sin = tl.fma(z * x, sin, x)
    cos = tl.fma(tl.fma(z, 2.44384514e-5, -0.00138873675), z, 0.0416666469)
    cos = tl.fma(z, tl.fma(z, cos, -0.5), 1.0)
    odd = (quarter & 1) != 0
    back = (quarter & 2) != 0
    c = tl.where(odd, -sin, cos)
    s = tl.where(odd, cos, sin)
    return tl.where(back, -c, c), tl.where(back, -s, s)


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normals from two uint32 words."""
    # radius = sqrt(-2 ln u), u = max(float32(w), 1/2) / 2^32;  a Newton step makes rsqrt exact
    square = -2.0 * log_fraction(tl.maximum(radius_word.to(tl.float32), 0.5))
    square = tl.maximum(square, 1e-37)  # u = 1 has radius 0, where rsqrt has none
    inverse = tl.rsqrt(square)
    radius = square * inverse
    radius = tl.fma(tl.fma(-radius, radius, square), 0.5 * inverse, radius)
    cos, sin = cos_sin_turn(angle_word)
    return radius * cos, radius * sin


@triton.jit
def normal_block(key_ptr, sample, part, BLOCK: tl.constexpr):
    """Normals [BLOCK] of block ``part`` of the sample with global index ``sample``."""
    w0, w1, w2, w3 = words(key_ptr, sample, part, BLOCK)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return in_order(z0, z1, z2, z3, BLOCK)


@triton.jit
def uniform_block(key_ptr, sample, part, BLOCK: tl.constexpr):
    """Uniforms [BLOCK] of block ``part`` of the sample with global index ``sample``."""
    w0, w1, w2, w3 = words(key_ptr, sample, part, BLOCK)
    # u = (floor(w / 2^9) + 1/2) / 2^23, exact in float32
    return ((in_order(w0, w1, w2, w3, BLOCK) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-7


@triton.jit
def _noise_kernel(
    key_ptr,
    sample_ptr,
    out_ptr,
    DRAW: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    # out[i, 4 k + j] = normal or uniform j of Philox(counter = (k, sample[i], step, stream))
    i, part, start, lanes, exists = locate(N, BLOCK, PARTS)
    value = DRAW(key_ptr, tl.load(sample_ptr + i), part, BLOCK)
    tl.store(out_ptr + start + lanes, value.to(out_ptr.dtype.element_ty), mask=exists)


def _launch(draw, key, sample, shape, dtype) -> torch.Tensor:
    check_storage(dtype=dtype)
    out = torch.empty((sample.shape[0], *shape), dtype=dtype, device=sample.device)
    if out.numel() == 0:
        return out
    elements = math.prod(shape)
    parts, options = cut(elements, NOISE_BLOCK, NOISE_BLOCK)
    with on_device_of(out):
        _noise_kernel[(out.shape[0] * parts,)](
            key.contiguous(),
            sample.contiguous(),
            out,
            DRAW=draw,
            **options,
        )
    return out


def normal(
    key: torch.Tensor, sample: torch.Tensor, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Launch `fastdistill::normal`; the arguments are those of `fastdistill.ops.normal`."""
    return _launch(normal_block, key, sample, shape, dtype)


def uniform(
    key: torch.Tensor, sample: torch.Tensor, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Launch `fastdistill::uniform`; the arguments are those of `fastdistill.ops.uniform`."""
    return _launch(uniform_block, key, sample, shape, dtype)
