"""What the patches of transformer blocks share: norms, gates, feed-forwards and attention.

Ops run as kernels in eager mode. ``torch.compile`` gets their formulas in plain torch instead,
which it fuses with what is around them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.layers.accelerate import is_changed, is_hooked
from fastdistill.layers.priority import priority_of
from fastdistill.layers.saving import cheap, layers_of
from fastdistill.ops import gated_residual, modulated_norm, rms_norm_rope
from fastdistill.ops.gated_residual import _gated_residual
from fastdistill.ops.modulated_norm import _modulated_norm
from fastdistill.ops.rms_norm_rope import _rms_norm_rope


def norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The modulated layer norm of x  # [B, T, C], [B, C], [B, C] -> [B, T, C]"""

    def made(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return modulated_norm(x, scale=scale, shift=shift, eps=eps).y

    if torch.compiler.is_compiling():
        return _modulated_norm.reference(x, None, None, scale, shift, True, eps)[1]
    return cheap(made(x, scale, shift), made, x, scale, shift)


def add_and_norm(
    x: Tensor, h: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate * h and its modulated layer norm  # [B, T, C], [B, T, C]"""

    def made(x: Tensor, h: Tensor | None, gate: Tensor | None, *modulation: Tensor) -> Tensor:
        scale, shift = modulation
        return modulated_norm(x, scale=scale, shift=shift, residual=h, gate=gate, eps=eps).y

    if torch.compiler.is_compiling():
        return _modulated_norm.reference(x, h, gate, scale, shift, True, eps)[:2]
    total, y = modulated_norm(x, scale=scale, shift=shift, residual=h, gate=gate, eps=eps)
    if gate is not None and gate.requires_grad:
        return total, cheap(y, made, x, h, gate, scale, shift)
    return total, cheap(y, made, total, None, None, scale, shift)


def add_gated(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x + gate * h  # [B, T, C]"""
    if torch.compiler.is_compiling():
        return _gated_residual.reference(x, h, gate)
    return gated_residual(x, h, gate)


def feed_forward(block: Any, module: Any, y: Tensor) -> Tensor:
    """A block's feed-forward, in chunks where diffusers' ``set_chunk_feed_forward`` asks for it."""
    if block._chunk_size is None:
        return module(y)
    from diffusers.models.attention import _chunked_feed_forward

    return _chunked_feed_forward(module, y, block._chunk_dim, block._chunk_size)


def is_gelu_feed_forward(module: Any) -> bool:
    """Whether a feed-forward is a projection, GELU, an idle dropout and a projection."""
    from diffusers.models.activations import GELU
    from diffusers.models.attention import FeedForward

    return type(module) is FeedForward and type(module.net[0]) is GELU


def gelu_feed_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[B, T, C] -> [B, T, C]; GELU's value is not saved."""
    first, dropout, last, *rest = self.net
    if is_hooked(first) or (dropout.training and dropout.p > 0):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    (projected,) = layers_of(hidden_states, first.proj)
    (out,) = layers_of(gelu(projected, first.approximate), last)
    for layer in rest:
        out = layer(out)
    return out


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, made again rather than saved by what follows."""

    def made(x: Tensor) -> Tensor:
        return F.gelu(x, approximate=approximate)

    return cheap(made(x), made, x)


def heads_of(value: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] -> [B, T, H, D]"""
    return value.unflatten(-1, (heads, -1))


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's attention of tokens by heads  # [B, T, H, D] -> [B, T, H * D]"""
    q, k, v = (value.transpose(1, 2) for value in (q, k, v))
    with priority_of(attn, q):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def is_rms_norm(module: Any) -> bool:
    """Whether a norm of queries or keys is an RMS norm with a weight and nothing else."""
    from diffusers.models.normalization import RMSNorm

    if not isinstance(module, (RMSNorm, nn.RMSNorm)) or module.weight is None:
        return False
    return getattr(module, "bias", None) is None and module.eps is not None


def join(
    norm: Any, x: Tensor, second_norm: Any, second: Tensor | None, rotary: Any = None
) -> Tensor:
    """Queries or keys [B, T, H, D] of x and then of ``second``, normalised and rotated.

    A norm that is None is no norm.
    """
    if norm is None:
        return x if second is None else torch.cat([x, second], dim=1)
    weight = None if second is None else second_norm.weight
    if torch.compiler.is_compiling():
        cos, sin = (None, None) if rotary is None else rotary
        return _rms_norm_rope.reference(x, norm.weight, second, weight, cos, sin, norm.eps)
    return rms_norm_rope(x, norm.weight, second, weight, rotary=rotary, eps=norm.eps)


def modulations(
    self: Any,
    x: Tensor | None = None,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> Tensor:
    """An adaptive norm's modulations without the norm, which its block does  # [B, n * C]"""
    if getattr(self, "emb", None) is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    return self.linear(self.silu(emb))


def is_bare_norm(module: Any) -> bool:
    """Whether a module is a layer norm without weights, and no more."""
    plain = isinstance(module, nn.LayerNorm) and not module.elementwise_affine
    return plain and not is_changed(module)
