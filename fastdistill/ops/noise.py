"""Counter-based random numbers: pure functions of (seed, stream, step, sample, element).

One Philox-4x32-10 call (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
yields four 32-bit words, and so four normals or four uniforms:

    counter = (block, sample, step, stream)      element = 4 * block + j,  j = 0..3
    key     = (seed mod 2^32, seed >> 32)
    uniform:  u_j = (floor(w_j / 2^9) + 1/2) / 2^23                    strictly inside (0, 1)
    normal:   (z_0, z_1) = sqrt(-2 ln u) (cos 2 pi v, sin 2 pi v)      from (w_0, w_1)
              (z_2, z_3) likewise                                      from (w_2, w_3)
              u = max(float32(w), 1/2) / 2^32,   v = w' / 2^32

Every u is exact in float32, so uniforms agree bitwise on all backends and normals up to the last
place of log, sqrt, sin and cos. The largest normal is sqrt(2 ln 2^33) = 6.76. ``sample`` is the
*global* index of each row, so that two ranks draw what one rank would have drawn; the key is a
tensor on the device, so that a captured CUDA graph draws new numbers on each replay.

Bytes moved: the output, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastdistill.ops._op import Op

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


Word = TypeVar("Word", int, Tensor)


def philox_4x32(counter: Sequence[Word], key: Sequence[Word]) -> list[Word]:
    """Philox-4x32 with ten rounds, on int64 tensors that hold unsigned words or on Python's ints.

    Args:
        counter: four words, broadcastable if tensors.
        key: two words.

    Returns:
        Four words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap in int64, but their bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _words(key: Tensor, sample: Tensor, elements: int) -> Tensor:
    """Random words of each sample  # [B, ceil(elements / 4), 4]"""
    seed, stream, step = key.unbind()
    block = torch.arange(-(-elements // 4), device=sample.device)[None, :]
    counter = (block, sample[:, None] & _MASK, step & _MASK, stream & _MASK)
    words = philox_4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1)


def _normal_reference(key: Tensor, sample: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    elements = math.prod(shape)
    words = _words(key, sample, elements).unflatten(-1, (2, 2))
    radius_word, angle_word = words.unbind(-1)
    u = radius_word.float().clamp(min=0.5).double() * 2.0**-32
    angle = angle_word.double() * (2 * math.pi * 2.0**-32)
    radius = torch.sqrt(-2 * torch.log(u))
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return z.flatten(1)[:, :elements].to(dtype).reshape(sample.shape[0], *shape)


def _uniform_reference(key: Tensor, sample: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    elements = math.prod(shape)
    words = _words(key, sample, elements).flatten(1)[:, :elements]
    u = ((words >> 9).double() + 0.5) * 2.0**-23
    return u.to(dtype).reshape(sample.shape[0], *shape)


def _fake(key: Tensor, sample: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty((sample.shape[0], *shape), dtype=dtype, device=sample.device)


_SCHEMA = "(Tensor key, Tensor sample, SymInt[] shape, ScalarType dtype) -> Tensor"
_normal = Op("normal", _SCHEMA, _normal_reference, _fake, kernel="noise", replicated=(0,))
_uniform = Op("uniform", _SCHEMA, _uniform_reference, _fake, kernel="noise", replicated=(0,))


def check_key(key: Tensor, sample: Tensor) -> None:
    """Refuse a noise key or sample indices of another form than the ops read.

    Raises:
        ValueError: unless ``key`` is int64 [3] and ``sample`` int64 [B] on the same device.
    """
    if key.dtype != torch.int64 or key.shape != (3,):
        raise ValueError(
            f"key is {key.dtype} of shape {tuple(key.shape)}; expected the int64 triple "
            "(seed, stream, step), as fastdistill.diffusion.Noise makes it"
        )
    if sample.dtype != torch.int64 or sample.ndim != 1 or sample.device != key.device:
        raise ValueError(
            f"sample is {sample.dtype} of shape {tuple(sample.shape)} on {sample.device}; expected "
            f"the samples' global indices, int64 [B], on {key.device}"
        )


def normal(
    key: Tensor, sample: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise, the same for the same (key, sample index) on every backend.

    Args:
        key: (seed, stream, step), int64 [3].
        sample: global index of each sample, int64 [B].
        shape: shape of one sample.
        dtype: storage dtype; drawn in float32 (in float64 by the reference) and rounded once.

    Returns:
        Noise of shape [B, *shape].

    Raises:
        ValueError: for a key or indices of another form.
    """
    check_key(key, sample)
    return _normal(key, sample.contiguous(), list(shape), dtype)


def uniform(
    key: Tensor, sample: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers strictly inside (0, 1), bitwise the same on every backend.

    In bfloat16 and float16 the nearest number to the largest of them is 1.

    Arguments, result and errors are those of `normal`.
    """
    check_key(key, sample)
    return _uniform(key, sample.contiguous(), list(shape), dtype)
