"""Patches of blocks with joint attention of an image and a text stream: SD3, SD3.5 and Flux.

A block is patched as a whole: norms and gates become the ops' modulations, queries and keys are
normalised, joined and rotated in one pass, feed-forwards save what is not made again cheaply.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from fastdistill.layers.accelerate import (
    Patch,
    Undo,
    in_turn,
    is_changed,
    replace_attribute,
    replace_forward,
    runs,
)
from fastdistill.layers.priority import priority_of
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
    is_rms_norm,
    join,
    modulations,
    norm,
)

_Pair = tuple[Tensor, Tensor]


class JointTokenAttention(JointAttnProcessor2_0):
    """What `JointAttnProcessor2_0` computes, queries and keys normalised and joined at once."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """[B, T, C], [B, L, C] -> the same shapes"""
        q, k, v = _heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        if encoder_hidden_states is None:
            q, k = join(attn.norm_q, q, None, None), join(attn.norm_k, k, None, None)
            out = attend(attn, q, k, v)
            return attn.to_out[1](attn.to_out[0](out))
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = _heads(attn, encoder_hidden_states, *layers)
        q = join(attn.norm_q, q, attn.norm_added_q, text_q)
        k = join(attn.norm_k, k, attn.norm_added_k, text_k)
        out = attend(attn, q, k, join(None, v, None, text_v))
        tokens = hidden_states.shape[1]
        image, text = out[:, :tokens], out[:, tokens:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


class FluxTokenAttention(FluxAttnProcessor):
    """What `FluxAttnProcessor` computes, queries and keys normalised, joined and turned at once."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """[B, T, C], [B, L, C] -> the same shapes"""
        q, k, v = _heads(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        if attn.added_kv_proj_dim is None:
            q = join(attn.norm_q, q, None, None, image_rotary_emb)
            k = join(attn.norm_k, k, None, None, image_rotary_emb)
        else:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = _heads(attn, encoder_hidden_states, *layers)
            q = join(attn.norm_added_q, text_q, attn.norm_q, q, image_rotary_emb)
            k = join(attn.norm_added_k, text_k, attn.norm_k, k, image_rotary_emb)
            v = join(None, text_v, None, v)
        with priority_of(attn, q):
            out = dispatch_attention_fn(
                *(q, k, v),
                attn_mask=attention_mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        out = out.flatten(2, 3).to(q.dtype)
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        text, image = out[:, :length].contiguous(), out[:, length:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def _heads(attn: Any, value: Any, *layers: nn.Module) -> list[Tensor]:
    return [heads_of(found, attn.heads) for found in layers_of(value, *layers)]


def _joint_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """[B, T, C], [B, L, C], [B, C] -> text (None from the last block) and image"""
    options, c = joint_attention_kwargs or {}, encoder_hidden_states
    shift1, scale1, gate1, shift2, scale2, gate2, *dual = self.norm1(emb=temb).chunk(
        9 if self.use_dual_attention else 6, dim=1
    )
    eps = self.norm1.norm.eps
    y = norm(hidden_states, scale1, shift1, eps)
    if self.context_pre_only:
        c_scale, c_shift = self.norm1_context(emb=temb).chunk(2, dim=1)
    else:
        text = self.norm1_context(emb=temb).chunk(6, dim=1)
        c_shift, c_scale = text[:2]
    y_context = norm(c, c_scale, c_shift, self.norm1_context.norm.eps)
    h, h_context = self.attn(hidden_states=y, encoder_hidden_states=y_context, **options)
    x, gate = hidden_states, gate1
    if self.use_dual_attention:
        y = norm(hidden_states, dual[1], dual[0], eps)
        x, gate = add_gated(x, h, gate), dual[2]
        h = self.attn2(hidden_states=y, **options)
    x, y = add_and_norm(x, h, gate, scale2, shift2, self.norm2.eps)
    x = add_gated(x, feed_forward(self, self.ff, y), gate2)
    if self.context_pre_only:
        return None, x
    return _text_stream(self, c, h_context, text[2:]), x


def _text_stream(block: Any, c: Tensor, h: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
    """The text tokens behind the joint attention  # [B, L, C]"""
    gate1, shift, scale, gate2 = modulation
    c, y = add_and_norm(c, h, gate1, scale, shift, block.norm2_context.eps)
    chunked = hasattr(block, "_chunk_size")
    h = feed_forward(block, block.ff_context, y) if chunked else block.ff_context(y)
    return add_gated(c, h, gate2)


def _flux_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: _Pair | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> _Pair:
    """[B, T, C], [B, L, C], [B, C] -> text and image"""
    shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(emb=temb).chunk(6, dim=1)
    c_shift, c_scale, *text = self.norm1_context(emb=temb).chunk(6, dim=1)
    h, h_context, *adapter = self.attn(
        hidden_states=norm(hidden_states, scale1, shift1, self.norm1.norm.eps),
        encoder_hidden_states=norm(
            encoder_hidden_states, c_scale, c_shift, self.norm1_context.norm.eps
        ),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, y = add_and_norm(hidden_states, h, gate1, scale2, shift2, self.norm2.eps)
    x = add_gated(x, self.ff(y), gate2)
    for value in adapter:
        x = x + value
    return _clip(_text_stream(self, encoder_hidden_states, h_context, tuple(text))), x


def _flux_single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: _Pair | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> _Pair:
    """[B, T, C], [B, L, C], [B, C] -> text and image"""
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = self.norm(emb=temb).chunk(3, dim=1)
    y = norm(x, scale, shift, self.norm.norm.eps)
    (projected,) = layers_of(y, self.proj_mlp)
    options = joint_attention_kwargs or {}
    h = self.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **options)
    value = cheap(_beside_gelu(h, projected), _beside_gelu, h, projected)
    (h,) = layers_of(value, self.proj_out)
    x = _clip(add_gated(x, h, gate))
    return x[:, :length], x[:, length:]


def _beside_gelu(h: Tensor, projected: Tensor) -> Tensor:
    return torch.cat([h, F.gelu(projected, approximate="tanh")], dim=2)


def _clip(value: Tensor) -> Tensor:
    return value.clip(-65504, 65504) if value.dtype == torch.float16 else value


def _is_joint_attention(module: Any) -> bool:
    if type(module) is not Attention or type(module.processor) is not JointAttnProcessor2_0:
        return False
    return _same_norms(module, module.added_kv_proj_dim is not None)


def _is_flux_attention(module: Any) -> bool:
    if type(module) is not FluxAttention or type(module.processor) is not FluxAttnProcessor:
        return False
    known = not module.fused_projections and module.norm_q.weight is not None
    return known and _same_norms(module, module.added_kv_proj_dim is not None)


def _same_norms(attn: Any, joint: bool) -> bool:
    """Whether queries and keys, of both streams, have RMS norms with one eps, or no norm at all."""
    norms = [attn.norm_q, attn.norm_k]
    norms += [attn.norm_added_q, attn.norm_added_k] if joint else []
    if all(value is None for value in norms):
        return True
    if not all(is_rms_norm(value) and not is_changed(value) for value in norms):
        return False
    return len({value.eps for value in norms}) == 1


def _is_adaptive(module: Any, kind: type[nn.Module]) -> bool:
    return runs(module, kind) and is_bare_norm(module.norm) and getattr(module, "emb", None) is None


def _is_joint_block(module: Any) -> bool:
    if not runs(module, JointTransformerBlock) or not _is_joint_attention(module.attn):
        return False
    own = SD35AdaLayerNormZeroX if module.use_dual_attention else AdaLayerNormZero
    text = AdaLayerNormContinuous if module.context_pre_only else AdaLayerNormZero
    norms = _is_adaptive(module.norm1, own) and is_bare_norm(module.norm2)
    if module.context_pre_only:
        norms = norms and _is_context_norm(module.norm1_context)
    else:
        norms = norms and _is_adaptive(module.norm1_context, text)
        norms = norms and is_bare_norm(module.norm2_context)
        norms = norms and is_gelu_feed_forward(module.ff_context)
    second = module.attn2 is None or _is_joint_attention(module.attn2)
    return norms and second and is_gelu_feed_forward(module.ff)


def _is_context_norm(module: Any) -> bool:
    return runs(module, AdaLayerNormContinuous) and is_bare_norm(module.norm)


def _is_flux_block(module: Any) -> bool:
    if not runs(module, FluxTransformerBlock) or not _is_flux_attention(module.attn):
        return False
    pairs = ((module.norm1, module.norm2), (module.norm1_context, module.norm2_context))
    norms = all(_is_adaptive(a, AdaLayerNormZero) and is_bare_norm(b) for a, b in pairs)
    return norms and is_gelu_feed_forward(module.ff) and is_gelu_feed_forward(module.ff_context)


def _is_flux_single_block(module: Any) -> bool:
    if not runs(module, FluxSingleTransformerBlock) or not _is_flux_attention(module.attn):
        return False
    known = type(module.act_mlp) is nn.GELU and module.act_mlp.approximate == "tanh"
    return known and _is_adaptive(module.norm, AdaLayerNormZeroSingle)


def _replace_joint_block(module: Any) -> Undo:
    attentions = [module.attn, *([] if module.attn2 is None else [module.attn2])]
    gated = [module.ff, *([] if module.context_pre_only else [module.ff_context])]
    return in_turn(
        replace_forward(module, _joint_block),
        *(replace_forward(part, modulations) for part in (module.norm1, module.norm1_context)),
        *(replace_attribute(part, "processor", JointTokenAttention()) for part in attentions),
        *(replace_forward(part, gelu_feed_forward) for part in gated),
    )


def _flux_processor(attn: Any) -> Undo:
    processor = FluxTokenAttention()
    vars(processor).update(vars(attn.processor))
    return replace_attribute(attn, "processor", processor)


def _replace_flux_block(module: Any) -> Undo:
    return in_turn(
        replace_forward(module, _flux_block),
        *(replace_forward(part, modulations) for part in (module.norm1, module.norm1_context)),
        _flux_processor(module.attn),
        *(replace_forward(part, gelu_feed_forward) for part in (module.ff, module.ff_context)),
    )


def _replace_flux_single_block(module: Any) -> Undo:
    return in_turn(
        replace_forward(module, _flux_single_block),
        replace_forward(module.norm, modulations),
        _flux_processor(module.attn),
    )


PATCHES = (
    Patch(
        "sd3_block",
        "SD3's block: gates, norms, modulations in one pass; queries and keys (SD3.5) in one",
        _is_joint_block,
        _replace_joint_block,
    ),
    Patch(
        "flux_block",
        "Flux's block of two streams: the same, with rotary angles",
        _is_flux_block,
        _replace_flux_block,
    ),
    Patch(
        "flux_single_block",
        "Flux's block of one stream: the same",
        _is_flux_single_block,
        _replace_flux_single_block,
    ),
)
