"""Patches of DiT's and PixArt's blocks, and of DiT's embedders, one of which every block has.

Both models are made of `BasicTransformerBlock`. A block is patched as a whole: its norms become the
ops' modulations, its feed-forward and attention save what is not made again cheaply.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor

from fastdistill.layers.accelerate import (
    Patch,
    Undo,
    in_turn,
    replace_attribute,
    replace_forward,
    runs,
)
from fastdistill.layers.saving import cheap, layers_of
from fastdistill.layers.tokens import (
    add_and_norm,
    add_gated,
    attend,
    feed_forward,
    gelu_feed_forward,
    heads_of,
    is_bare_norm,
    is_gelu_feed_forward,
    modulations,
    norm,
)
from fastdistill.ops import gated_residual


def is_plain_attention(module: Any) -> bool:
    """Whether an attention has no norms and no residual of its own, and divides by 1."""
    if type(module) is not Attention or type(module.processor) is not AttnProcessor2_0:
        return False
    norms = (module.spatial_norm, module.group_norm, module.norm_cross, module.norm_q)
    plain = all(value is None for value in norms) and not module.residual_connection
    return plain and module.rescale_output_factor == 1


class TokenAttention(AttnProcessor2_0):
    """What `AttnProcessor2_0` computes for tokens, without dividing by 1 or repeating masks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, C], [B, L, E], mask [B, 1, L] added to the scores -> [B, T, C]"""
        if encoder_hidden_states is None:
            q, k, v = layers_of(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            (q,) = layers_of(hidden_states, attn.to_q)
            k, v = layers_of(encoder_hidden_states, attn.to_k, attn.to_v)
        mask = None if attention_mask is None else _mask(attn, attention_mask, k)
        q, k, v = (heads_of(value, attn.heads) for value in (q, k, v))
        out = attend(attn, q, k, v, mask)
        return attn.to_out[1](attn.to_out[0](out))


def _mask(attn: Any, mask: Tensor, k: Tensor) -> Tensor:
    """A mask for all heads: shared by them, where diffusers copies it  # [B, 1 or H, 1 or T, L]"""
    if mask.ndim == 3 and (mask.shape[0], mask.shape[2]) == tuple(k.shape[:2]):
        return mask[:, None]
    mask = attn.prepare_attention_mask(mask, k.shape[1], k.shape[0])
    return mask.view(k.shape[0], attn.heads, -1, mask.shape[-1])


def _is_block(module: Any, kind: str) -> bool:
    if not runs(module, BasicTransformerBlock) or module.norm_type != kind:
        return False
    extras = module.pos_embed is None and not hasattr(module, "fuser")
    return extras and not module.only_cross_attention and is_gelu_feed_forward(module.ff)


def _is_dit_block(module: Any) -> bool:
    if not _is_block(module, "ada_norm_zero") or module.attn2 is not None:
        return False
    plain = runs(module.norm1, AdaLayerNormZero) and is_plain_attention(module.attn1)
    return plain and is_bare_norm(module.norm1.norm) and is_bare_norm(module.norm3)


def _is_pixart_block(module: Any) -> bool:
    if not _is_block(module, "ada_norm_single") or module.attn2 is None:
        return False
    plain = is_plain_attention(module.attn1) and is_plain_attention(module.attn2)
    return plain and is_bare_norm(module.norm1) and is_bare_norm(module.norm2)


def _dit_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """[B, T, C], time [B], labels [B] -> [B, T, C]"""
    modulation = self.norm1(None, timestep, class_labels, hidden_dtype=hidden_states.dtype)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
    y = norm(hidden_states, scale1, shift1, self.norm1.norm.eps)
    h = self.attn1(y, attention_mask=attention_mask, **_known(cross_attention_kwargs))
    x, y = add_and_norm(hidden_states, h, gate1, scale2, shift2, self.norm3.eps)
    return add_gated(x, feed_forward(self, self.ff, y), gate2)


def _pixart_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """[B, T, C], context [B, L, C], modulations of all blocks [B, 6 C] -> [B, T, C]"""
    options = _known(cross_attention_kwargs)
    modulation = self.scale_shift_table[None] + timestep.reshape(len(hidden_states), 6, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(dim=1)
    y = norm(hidden_states, scale1, shift1, self.norm1.eps)
    h = self.attn1(y, attention_mask=attention_mask, **options)
    x = add_gated(hidden_states, h, gate1)
    if gate1.requires_grad:
        x = cheap(x, gated_residual, hidden_states, h, gate1)
    context = {"encoder_hidden_states": encoder_hidden_states}
    h = self.attn2(x, **context, attention_mask=encoder_attention_mask, **options)
    x, y = add_and_norm(x, h, None, scale2, shift2, self.norm2.eps)
    return add_gated(x, feed_forward(self, self.ff, y), gate2)


def _known(options: dict[str, Any] | None) -> dict[str, Any]:
    """Attention's own options: those of GLIGEN are for blocks that have it."""
    return {name: value for name, value in (options or {}).items() if name != "gligen"}


def _replace_dit_block(module: Any) -> Undo:
    return in_turn(
        replace_forward(module, _dit_block),
        replace_forward(module.norm1, modulations),
        replace_attribute(module.attn1, "processor", TokenAttention()),
        replace_forward(module.ff, gelu_feed_forward),
    )


def _replace_pixart_block(module: Any) -> Undo:
    return in_turn(
        replace_forward(module, _pixart_block),
        replace_attribute(module.attn1, "processor", TokenAttention()),
        replace_attribute(module.attn2, "processor", TokenAttention()),
        replace_forward(module.ff, gelu_feed_forward),
    )


PATCHES = (
    Patch(
        "dit_block",
        "DiT's block: gates, norms and modulations in one pass; their values and GELU's not kept",
        _is_dit_block,
        _replace_dit_block,
    ),
    Patch(
        "pixart_block",
        "PixArt's block: the same, and masks that heads share",
        _is_pixart_block,
        _replace_pixart_block,
    ),
)
