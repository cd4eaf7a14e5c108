"""Patches of transformer blocks that U-Nets have: feed-forward, attention, and their norms."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from fastdistill.layers.accelerate import (
    Patch,
    Undo,
    in_turn,
    is_changed,
    is_hooked,
    replace_attribute,
    replace_forward,
    runs,
)
from fastdistill.layers.priority import priority_of
from fastdistill.layers.recompute import (
    Gate,
    Inputs,
    LayerNorm,
    Source,
    is_idle,
    linears_behind,
    value_of,
)
from fastdistill.layers.unet import group_norm, is_group_norm


def _is_gated(module: Any) -> bool:
    return runs(module, FeedForward) and runs(module.net[0], GEGLU) and _is_bare_gate(module)


def _is_bare_gate(feed_forward: Any) -> bool:
    """Whether the parts that a feed-forward no longer calls do nothing beside their work."""
    return not is_changed(feed_forward.net[0]) and not is_changed(feed_forward.net[1])


def _gated(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[B, T, C] -> [B, T, C']"""
    if not _is_bare_gate(self):
        return FeedForward.forward(self, hidden_states, *args, **kwargs)
    return _behind_gate(self, self.net[0].proj(hidden_states))


def _behind_gate(feed_forward: Any, projected: Tensor) -> Tensor:
    """What follows the first projection  # [B, T, 2 D] -> [B, T, C']"""
    _, dropout, out, *rest = feed_forward.net
    inputs = (projected.contiguous(),)
    if is_idle(dropout):
        hidden = linears_behind(Gate(), inputs, [out])[0]
    else:
        hidden = out(dropout(value_of(Gate(), inputs)))
    for layer in rest:
        hidden = layer(hidden)
    return hidden


def _divides(attn: Any) -> bool:
    """Whether an attention runs torch's kernel and then divides by 1."""
    torchs = isinstance(attn, Attention) and type(attn.processor) is AttnProcessor2_0
    return torchs and attn.rescale_output_factor == 1 and attn.spatial_norm is None


def _is_image_attention(module: Any) -> bool:
    return _divides(module) and is_group_norm(module.group_norm)


def _replace_processor(attn: Any) -> Undo:
    return replace_attribute(attn, "processor", UndividedAttention())


class UndividedAttention(AttnProcessor2_0):
    """What `AttnProcessor2_0` computes, without dividing by 1 and without keeping a group norm."""

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
        """[B, T, C] or [B, C, H, W] -> the same shape"""
        if attn.group_norm is not None and not is_group_norm(attn.group_norm):
            given = (hidden_states, encoder_hidden_states, attention_mask, temb)
            return super().__call__(attn, *given, *args, **kwargs)
        image, tokens = hidden_states, hidden_states
        if hidden_states.ndim == 4:
            tokens = hidden_states.flatten(2).transpose(1, 2)
        context = encoder_hidden_states
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if attn.group_norm is None:
            keys = tokens if context is None else context
            projections = (attn.to_q(tokens), attn.to_k(keys), attn.to_v(keys))
            hidden = attend(attn, projections, attention_mask)
        else:
            channels_first = image if image.ndim == 4 else image.transpose(1, 2)
            source = group_norm(attn.group_norm, channels_first, tokens=True)
            hidden = attend(attn, project_behind(attn, *source, context), attention_mask)
        if hidden_states.ndim == 4:
            hidden = hidden.transpose(1, 2).reshape(image.shape)
        return hidden + image if attn.residual_connection else hidden


def project_behind(
    attn: Any, source: Source, inputs: Inputs, context: Tensor | None
) -> tuple[Tensor, ...]:
    """Queries, keys and values of an attention whose input is the value of ``source``."""
    if context is None:
        return tuple(linears_behind(source, inputs, [attn.to_q, attn.to_k, attn.to_v]))
    queries = linears_behind(source, inputs, [attn.to_q])[0]
    return queries, attn.to_k(context), attn.to_v(context)


def attend(attn: Any, projections: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """Attention of the queries, keys and values [B, T, H D], and its output layer  # [B, T, C]"""
    q, k, v = projections
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, k.shape[1], k.shape[0])
        mask = mask.view(k.shape[0], attn.heads, -1, mask.shape[-1])
    q, k, v = (value.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for value in (q, k, v))
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    with priority_of(attn, q):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.transpose(1, 2).flatten(2).to(q.dtype)
    return attn.to_out[1](attn.to_out[0](out))


def _is_layer_norm(module: Any) -> bool:
    return type(module) is nn.LayerNorm and not is_changed(module)


def _is_block(module: Any) -> bool:
    """Whether a block is U-Nets' own: layer norms in front of attention, attention and gate."""
    if not runs(module, BasicTransformerBlock) or module.norm_type != "layer_norm":
        return False
    return module.pos_embed is None and not hasattr(module, "fuser") and _has_bare_norms(module)


def _has_bare_norms(block: Any) -> bool:
    """Whether the norms that a block no longer calls do nothing beside their work."""
    second = block.attn2 is None or _is_layer_norm(block.norm2)
    return _is_layer_norm(block.norm1) and second and _is_layer_norm(block.norm3)


def _block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """[B, T, C] -> [B, T, C]"""
    if self._chunk_size is not None or hidden_states.ndim != 3 or not _has_bare_norms(self):
        forward: Any = BasicTransformerBlock.forward
        texts = (encoder_hidden_states, encoder_attention_mask)
        rest = (timestep, cross_attention_kwargs, class_labels, added_cond_kwargs)
        return forward(self, hidden_states, attention_mask, *texts, *rest)
    x, options = hidden_states.contiguous(), cross_attention_kwargs or {}
    context = encoder_hidden_states if self.only_cross_attention else None
    x = _attention_of(self.attn1, self.norm1, x, context, attention_mask, options) + x
    if self.attn2 is not None:
        args = (encoder_hidden_states, encoder_attention_mask, options)
        x = _attention_of(self.attn2, self.norm2, x, *args) + x
    if not _gated_here(self.ff):
        return self.ff(self.norm3(x)) + x
    projected = linears_behind(*_layer_norm(self.norm3, x), [self.ff.net[0].proj])[0]
    return _behind_gate(self.ff, projected) + x


def _attention_of(
    attn: Any,
    norm: nn.LayerNorm,
    x: Tensor,
    context: Tensor | None,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    if options or not _is_plain_attention(attn):
        hidden = norm(x)
        return attn(hidden, encoder_hidden_states=context, attention_mask=mask, **options)
    return attend(attn, project_behind(attn, *_layer_norm(norm, x), context), mask)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> tuple[LayerNorm, Inputs]:
    return LayerNorm(norm.eps), (x, norm.weight, norm.bias)


def _gated_here(feed_forward: nn.Module) -> bool:
    """Whether `_gated` was put in place, so that its parts may be called one by one."""
    own = getattr(feed_forward.forward, "__func__", None)
    return own is _gated and not is_hooked(feed_forward) and _is_bare_gate(feed_forward)


def _is_plain_attention(attn: Any) -> bool:
    """Whether an attention does what its processor says and no more, for which we may do it."""
    if type(attn) is not Attention or is_changed(attn):
        return False
    if attn.group_norm is not None or attn.norm_cross or attn.residual_connection:
        return False
    return type(attn.processor) is UndividedAttention


def _replace_block(module: Any) -> Undo:
    attentions = [a for a in (module.attn1, module.attn2) if a is not None and _divides(a)]
    replaced = [attn for attn in attentions if attn.group_norm is None]
    return in_turn(replace_forward(module, _block), *map(_replace_processor, replaced))


PATCHES = (
    Patch(
        "gated_feed_forward",
        "FeedForward with GEGLU: both halves read where they lie, the gate's value not kept",
        _is_gated,
        lambda module: replace_forward(module, _gated),
    ),
    Patch(
        "image_attention",
        "Attention with a group norm, whose value is not kept; no division by 1",
        _is_image_attention,
        _replace_processor,
    ),
    Patch(
        "transformer_block",
        "BasicTransformerBlock: the values of its layer norms not kept; no division by 1",
        _is_block,
        _replace_block,
    ),
)
