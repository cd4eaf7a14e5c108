"""A call of every op with all its options, for tests that hold for ops in general."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.diffusion import Noise
from fastdistill.ops._op import Op
from fastdistill.ops.adamw import _adamw_ema_
from fastdistill.ops.consistency import _consistency_cotangent
from fastdistill.ops.denoising import _denoising_cotangent
from fastdistill.ops.density_ratio import _density_ratio_weight
from fastdistill.ops.gated_residual import _gated_residual, _gated_residual_backward
from fastdistill.ops.gaussian import _gaussian_transport
from fastdistill.ops.glu import _geglu, _geglu_backward
from fastdistill.ops.group_norm import _group_norm_silu, _group_norm_silu_backward
from fastdistill.ops.matching import _matching_cotangent
from fastdistill.ops.mixture import _mixture_denoise, _mixture_denoise_backward
from fastdistill.ops.modulated_norm import _modulated_norm, _modulated_norm_backward
from fastdistill.ops.noise import _normal, _uniform
from fastdistill.ops.norm import _sum_of_squares
from fastdistill.ops.projection import _projection_cotangents
from fastdistill.ops.renoise import _renoise
from fastdistill.ops.rms_norm_rope import _rms_norm_rope, _rms_norm_rope_backward

Arguments = tuple[Any, ...]


def calls(
    batch: int = 3,
    shape: tuple[int, ...] = (2, 4, 4),
    dtype: torch.dtype = torch.float32,
    raw: torch.dtype | None = None,
    grad: bool = False,
) -> dict[Op, Arguments]:
    """Arguments of every op on the CPU; ``raw`` is the dtype of network outputs."""
    generator = torch.Generator().manual_seed(0)
    elements, raw = math.prod(shape), raw or dtype

    def sample(kind: torch.dtype) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(kind)

    def number() -> Tensor:
        return torch.rand(batch, generator=generator) + 0.3

    x, x_t, noisy = sample(dtype).requires_grad_(grad), sample(dtype), sample(dtype)
    cond, uncond, critic = sample(raw), sample(raw), sample(raw)
    prediction = cond.clone().requires_grad_(grad)
    a, b, c, d, weight = (number() for _ in range(5))
    key, index = Noise(1).key("x"), torch.arange(batch)
    teacher, student = (cond, a, b), (critic, c, d)
    means, gains = torch.randn(3, elements, generator=generator), torch.stack([a, b, c], dim=1)
    ratio = (torch.randn(batch, 2, generator=generator), index % 4, torch.ones(4, 2))
    spread, log_weights = a.new_full((3, 1), 0.7), torch.tensor([0.2, 0.5, 0.3]).log()
    state = [torch.rand(96 + elements, generator=generator) for _ in range(6)]
    updated = (*state[:4], torch.zeros(()), state[4:], torch.zeros_like(state[0]).bfloat16())
    scalars = (torch.tensor(2.0), torch.tensor(3.0), torch.tensor(0.5), key)
    tokens, h, v = (torch.randn(batch, 5, 8, generator=generator).to(dtype) for _ in range(3))
    live = tokens.clone().requires_grad_(grad)
    # Chunks of one tensor, so that samples lie apart.
    scale, shift, gate = torch.randn(batch, 24, generator=generator).to(dtype).chunk(3, dim=1)
    mean, rstd = torch.randn(2, batch, 5, generator=generator).abs().unbind()
    heads, text = tokens.view(batch, 5, 2, 4), h[:, :2].contiguous().view(batch, 2, 2, 4)
    w1, w2, angles = v[0, 0, :4], v[0, 1, :4], torch.randn(2, 7, 4, generator=generator)
    image = torch.randn(batch, 6, 3, 5, generator=generator).to(dtype)
    image_grad = torch.randn(batch, 6, 3, 5, generator=generator).to(dtype)
    normed = image.clone().requires_grad_(grad)
    embedding, norm_weight, norm_bias = (
        image[:, :, 0, 0].clone(),
        image[0, :, 1, 1],
        image[0, :, 2, 2],
    )
    numbers = torch.rand(2, batch, 2, generator=generator).to(
        torch.promote_types(dtype, torch.float32)
    )
    return {
        _normal: (key, index, list(shape), dtype),
        _uniform: (key, index, [5], torch.float32),
        _renoise: (x, a, b, key, index, c, raw),
        _denoising_cotangent: (prediction, x_t, noisy, a, b, weight, 0.5),
        _matching_cotangent: (
            *(x, x_t, *teacher, *student, uncond, 2.0, critic, 0.3, weight, True, 0.5),
            dtype,
        ),
        _density_ratio_weight: (*ratio, 1.0, 1.0, 1.0, -1.0, 0.9, 1.0, 10.0, 0.1, 20.0),
        _projection_cotangents: (
            *(x, x_t, *teacher, *student, uncond, 2.0, weight, a),
            *(1.0, 0.5, False, 1.2, True, 0.5),
        ),
        _consistency_cotangent: (
            *(prediction, x_t, a, b, critic, noisy, c, d, weight),
            *(1.0, 0.1, False, 0.5),
        ),
        _gaussian_transport: (x, means[0], means.T.contiguous(), a, b, c, gains, d, a, gains),
        _mixture_denoise: (x, a, b, means, spread, log_weights),
        _mixture_denoise_backward: (*(x.detach(), a, b, means, spread, gains.softmax(1), x_t, c),),
        _modulated_norm: (live, h, gate, scale, shift, True, 1e-6),
        _modulated_norm_backward: (tokens, h, gate, scale, mean, rstd, v, h, True, True),
        _gated_residual: (live, h, gate),
        _gated_residual_backward: (v, gate, h),
        _rms_norm_rope: (live.view(batch, 5, 2, 4), w1, text, w2, *angles, 1e-6),
        _rms_norm_rope_backward: (
            *(torch.cat((heads, text), dim=1), heads, w1, text, w2, *angles),
            1e-6,
        ),
        _geglu: (normed.flatten(2)[..., :14], "tanh"),
        _geglu_backward: (image_grad[..., 0], image[..., 0].repeat(1, 1, 2), "none", True),
        _group_norm_silu: (normed, embedding, norm_weight, norm_bias, 2, 1e-5, True),
        _group_norm_silu_backward: (
            *(image_grad, image, embedding, norm_weight, norm_bias, *numbers),
            *(2, True, True),
        ),
        _sum_of_squares: (x.detach(),),
        _adamw_ema_: (
            *(*updated, None, None, torch.zeros(2, dtype=torch.int32), *scalars, None),
            *([0, 40, 70], [0, 1, 0], [0.1, 0.2], [0.0, 0.1]),
            *(0.9, 0.999, 1e-8, 1.0, [0.9, 0.99], True),
        ),
    }


def map_tensors(function: Callable[[Tensor], Tensor], args: Arguments) -> Arguments:
    """The same arguments with every tensor, also those in lists, replaced."""
    return torch.utils._pytree.tree_map_only(Tensor, function, args)


def in_dtype(args: Arguments, dtype: torch.dtype) -> Arguments:
    """The same call with every floating tensor, and every dtype argument, in ``dtype``."""
    args = map_tensors(lambda v: v.to(dtype) if v.is_floating_point() else v.clone(), args)
    return tuple(dtype if isinstance(value, torch.dtype) else value for value in args)


def outcome(op: Op, run: Callable[..., Any], args: Arguments) -> tuple[Tensor, ...]:
    """Results of a call or, of an op in place, everything that it may have changed."""
    result = run(*args)
    if op is not _adamw_ema_:
        return result if isinstance(result, tuple) else (result,)
    assert result is None
    return (*args[:5], *args[5], args[6], args[9].float())
