"""`rms_norm_rope`: RMS norm of queries or keys, joined with a second stream's, and rotated.

    n = x / sqrt(mean(x^2) + eps) * weight         over the channels of a head (QK-RMSNorm)
    m = n of the first stream, then n of the second, along the tokens
    y = m                                          SD3.5
    y_2i   = m_2i   cos_2i   - m_2i+1 sin_2i       Flux, with cos and sin of the joint tokens
    y_2i+1 = m_2i+1 cos_2i+1 + m_2i   sin_2i+1

Backward, with u = dL/dm (dL/dy turned back), w = u weight and r = 1/sqrt(...):

    dx = r w - x r^3 mean(w x),   dweight = sum u x r over samples, tokens and heads

Only x and weight are kept; r is computed again.

Shapes: x [B, T, H, D]; weight [D]; cos, sin [T1 + T2, D] float32. Bytes moved: forward x read, y
written; backward x and dL/dy read, dx written. Cosines and sines are shared by samples and heads.
All arithmetic is float32 whatever the storage (float64 for float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops._arguments import check_floating
from fastdistill.ops._op import Op


def _turn(value: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Rotate pairs of channels [B, T, H, D] by the angles [T, D], or (transposed) ``back``."""
    even, odd = value.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (v.to(value.dtype)[:, None].unflatten(-1, (-1, 2)) for v in (cos, sin))
    (c0, c1), (s0, s1) = cos.unbind(-1), sin.unbind(-1)
    pairs = (
        (even * c0 + odd * s1, odd * c1 - even * s0)
        if back
        else (
            even * c0 - odd * s0,
            odd * c1 + even * s1,
        )
    )
    return torch.stack(pairs, dim=-1).flatten(-2)


def _rstd(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def _reference(
    x: Tensor,
    weight: Tensor,
    second: Tensor | None,
    second_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    streams = [(x.to(compute), weight.to(compute))]
    if second is not None and second_weight is not None:
        streams.append((second.to(compute), second_weight.to(compute)))
    y = torch.cat([value * _rstd(value, eps) * scale for value, scale in streams], dim=1)
    if cos is not None and sin is not None:
        y = _turn(y, cos, sin, back=False)
    return y.to(x.dtype)


def _backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    second: Tensor | None,
    second_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    u = grad.to(compute)
    if cos is not None and sin is not None:
        u = _turn(u, cos, sin, back=True)

    def stream(u: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.to(compute)
        rstd = _rstd(wide, eps)
        n, w = wide * rstd, u * weight.to(compute)
        dx = rstd * (w - n * (w * n).mean(dim=-1, keepdim=True))
        return dx.to(x.dtype), (u * n).sum(dim=(0, 1, 2)).to(weight.dtype)

    first = stream(u[:, : x.shape[1]], x, weight)
    if second is None or second_weight is None:
        return *first, x.new_empty(0), x.new_empty(0)
    return *first, *stream(u[:, x.shape[1] :], second, second_weight)


def _fake(x: Tensor, weight: Tensor, second: Tensor | None, *args: Any) -> Tensor:
    tokens = x.shape[1] + (0 if second is None else second.shape[1])
    return x.new_empty(x.shape[0], tokens, *x.shape[2:])


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    second: Tensor | None,
    second_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (x, weight, second, second_weight)
    a, b, c, d = (x.new_empty(0) if v is None else v.new_empty(v.shape) for v in given)
    return a, b, c, d


_rms_norm_rope = Op(
    "rms_norm_rope",
    "(Tensor x, Tensor weight, Tensor? second, Tensor? second_weight, Tensor? cos, Tensor? sin, "
    "float eps) -> Tensor",
    _reference,
    _fake,
    kernel="rms_norm_rope",
    replicated=(1, 3, 4, 5),
    native_cpu=False,
)
_rms_norm_rope_backward = Op(
    "rms_norm_rope_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? second, Tensor? second_weight, Tensor? cos, "
    "Tensor? sin, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    kernel="rms_norm_rope",
    batch_outputs=4,
    replicated=None,
    native_cpu=False,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.eps = inputs[6]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = _rms_norm_rope_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    needed = ctx.needs_input_grad[:4]
    return *(v if need else None for v, need in zip(found, needed, strict=True)), None, None, None


_rms_norm_rope.register_autograd(_backward, _setup_context)


def _check(x: Tensor, weight: Tensor, name: str) -> None:
    check_floating(name, x)
    check_floating(f"{name}'s weight", weight)
    if x.ndim != 4 or weight.shape != x.shape[3:] or weight.device != x.device:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} on {x.device} and its weight "
            f"{tuple(weight.shape)} on {weight.device}; expected [B, T, H, D] and [D]"
        )


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    second: Tensor | None = None,
    second_weight: Tensor | None = None,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Queries or keys, each head's channels normalised, of one stream of tokens or of two in a row.

    Differentiable once in ``x``, ``second`` and their weights.

    Args:
        x: tokens by heads [B, T1, H, D].
        weight: factor of each channel of a head [D].
        second: the tokens that follow, of the other stream in joint attention [B, T2, H, D].
        second_weight: its factors [D].
        rotary: (cos, sin) of all tokens, channels in pairs as diffusers' ``apply_rotary_emb`` takes
            them, each [T1 + T2, D].
        eps: added to the mean of the squares.

    Returns:
        Normalised, joined and rotated tokens in the dtype of ``x``  # [B, T1 + T2, H, D]

    Raises:
        ValueError: for shapes, dtypes or devices that do not belong together, for only one of
            ``second`` and ``second_weight``, and for angles of an odd number of channels.
    """
    _check(x, weight, "x")
    if (second is None) != (second_weight is None):
        raise ValueError("second and second_weight belong together: give both or neither")
    tokens = x.shape[1]
    if second is not None and second_weight is not None:
        _check(second, second_weight, "second")
        tokens += second.shape[1]
        if (second.shape[0], *second.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"second has shape {tuple(second.shape)}; expected that of x, {tuple(x.shape)}, "
                "but for the number of tokens"
            )
        second, second_weight = second.to(x.dtype).contiguous(), second_weight.contiguous()
    cos, sin = (None, None) if rotary is None else rotary
    for name, value in (("cos", cos), ("sin", sin)):
        wanted = (tokens, x.shape[3])
        if value is not None and (
            value.shape != wanted or value.device != x.device or wanted[1] % 2
        ):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; expected {wanted} on "
                f"{x.device}, of an even number of channels"
            )
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    return _rms_norm_rope(x.contiguous(), weight.contiguous(), second, second_weight, cos, sin, eps)
