"""`group_norm_silu`: group normalisation and SiLU in one op that keeps its input alone.

    z = x + shift                               shift [B, C]: a time embedding, where there is one
    n = (z - mean_g) rstd_g                     rstd_g = (var_g + eps)^(-1/2) of group g
    u = weight n + bias,   y = silu(u) = u sigmoid(u), or u itself without SiLU

and backward, with du = dy silu'(u) and means over the elements of a group,

    dz = rstd_g (weight du - mean_g(weight du) - n mean_g(weight du n)) = dx
    dshift = sum_places dz,    dweight = sum_{B, places} du n,    dbias = sum_{B, places} du

Shapes: x [B, C, ...], contiguous or with the channels last in memory; results lie as x does. Bytes
moved: forward x twice (once for the moments) and y once; backward x and dy twice, dx once, and y
where it is wanted again. Kept for the backward: x, and mean and rstd [B, G] in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops._op import Op


def is_channels_last(x: Tensor) -> bool:
    """Whether [B, C, ...] has its channels last in memory, and is not contiguous as it stands."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """``x`` [B, C, ...] if it is contiguous or channels-last, and a contiguous copy if not."""
    return x if is_channels_last(x) else x.contiguous()


def laid_out_as(value: Tensor, x: Tensor) -> Tensor:
    """``value`` [B, C, ...] with the channels last in memory where ``x`` has them so."""
    if is_channels_last(x):
        return value.movedim(1, -1).contiguous().movedim(-1, 1)
    return value.contiguous()


def _of_channels(value: Tensor, like: Tensor) -> Tensor:
    """[C] or [B, C] in the dtype of ``like``, shaped to broadcast against it  # [B, C, ...]"""
    return value.to(like.dtype).reshape(*value.shape, *[1] * (like.ndim - 2))


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """z in the dtype that is computed in, laid out so that torch's kernels take it."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    z = z if shift is None else z + _of_channels(shift, z)
    return z if z.device.type == "cpu" and z.ndim == 4 else z.contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2:].numel()


def _reference(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    z = _shifted(x, shift)
    affine = (weight.to(z.dtype), bias.to(z.dtype))
    u, mean, rstd = torch.native_group_norm(z, *affine, *_sizes(x), groups, eps)
    y = F.silu(u) if silu else u
    return laid_out_as(y.to(x.dtype), x), mean, rstd


def _fake(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, *rest: Any):
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=dtype) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _backward_reference(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
    value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z, wide = _shifted(x, shift), weight.to(torch.promote_types(x.dtype, torch.float32))
    du, y = grad.to(z.dtype), None
    if silu or value:
        # u = scale z + (bias - scale mean), as torch's kernel forms it;   scale = weight rstd
        per_group = (*mean.shape, 1)
        scale = (rstd.reshape(per_group) * wide.view(1, groups, -1)).flatten(1)
        offset = bias.to(z.dtype) - (mean.reshape(per_group) * scale.view(*mean.shape, -1)).flatten(
            1
        )
        u = torch.addcmul(_of_channels(offset, z), z, _of_channels(scale, z))
        y = F.silu(u) if silu else u
        du = torch.ops.aten.silu_backward(du, u) if silu else du
    dz, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        laid_out_as(du, z), z, mean, rstd, wide, *_sizes(x), groups, [True] * 3
    )
    none = x.new_empty(x.shape[0], 0)
    return (
        laid_out_as(dz.to(x.dtype), x),
        none if shift is None else dz.sum(tuple(range(2, x.ndim))).to(shift.dtype),
        dweight.to(weight.dtype),
        dbias.to(bias.dtype),
        laid_out_as(y.to(x.dtype), x) if value and y is not None else none,
    )


def _backward_fake(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, *rest: Any
):
    def none() -> Tensor:
        return x.new_empty(x.shape[0], 0)

    return (
        torch.empty_like(x),
        none() if shift is None else torch.empty_like(shift),
        torch.empty_like(weight),
        torch.empty_like(bias),
        torch.empty_like(x) if rest[-1] else none(),
    )


_group_norm_silu = Op(
    "group_norm_silu",
    "(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    kernel="group_norm",
    batch_outputs=3,
    replicated=(2, 3),
    native_cpu=False,
)
_group_norm_silu_backward = Op(
    "group_norm_silu_backward",
    "(Tensor grad, Tensor x, Tensor? shift, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "int groups, bool silu, bool value) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    kernel="group_norm",
    batch_outputs=5,
    replicated=None,
    native_cpu=False,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, groups, _, silu = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = (groups, silu)


def _backward(ctx: Any, grad: Tensor, *_: Tensor):
    x, shift, *rest = ctx.saved_tensors
    given = (laid_out_as(grad, x), x, shift, *rest, *ctx.options, False)
    dx, dshift, dweight, dbias, _ = _group_norm_silu_backward(*given)
    return dx, None if shift is None else dshift, dweight, dbias, None, None, None


_group_norm_silu.register_autograd(_backward, _setup_context)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """SiLU of the group norm of x + shift, computed in float32; keeps x for its backward.

    Args:
        x: [B, C, ...], contiguous or channels-last; float32, bfloat16 or float16 (float64 off the
            GPU).
        groups: number of groups G that the channels are divided into.
        weight: [C].
        bias: [C].
        eps: what is added to the variance.
        shift: added to each channel before the norm, such as a time embedding  # [B, C]
        silu: whether SiLU follows the norm.

    Returns:
        [B, C, ...] in the dtype of x and laid out as x.

    Raises:
        ValueError: for shapes that do not belong together.
    """
    _check(x, groups, weight, bias, shift)
    given = None if shift is None else shift.contiguous()
    return _group_norm_silu(dense(x), given, weight, bias, groups, eps, silu)[0]


def _check(x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None) -> None:
    if x.ndim < 3 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"x is {tuple(x.shape)}; expected [B, C, ...], C divisible by {groups}")
    for name, value in {"weight": weight, "bias": bias}.items():
        if value.shape != x.shape[1:2]:
            raise ValueError(f"{name} is {tuple(value.shape)}; expected [{x.shape[1]}]")
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(f"shift is {tuple(shift.shape)}; expected {tuple(x.shape[:2])}")
