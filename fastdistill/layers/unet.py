"""Patches of U-Nets: residual blocks, and the norms before transformers and before the output."""

from __future__ import annotations

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
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
from fastdistill.layers.recompute import (
    GroupNorm,
    Inputs,
    convolution_behind,
    is_idle,
    linears_behind,
    value_of,
)
from fastdistill.ops.group_norm import dense


def group_norm(
    norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, **options: bool
) -> tuple[GroupNorm, Inputs]:
    """A norm as a source of layers behind it, and its inputs."""
    source = GroupNorm(norm.num_groups, norm.eps, **options)
    given = None if shift is None else shift.contiguous()
    return source, (dense(x), given, norm.weight, norm.bias)


def is_group_norm(module: Any) -> bool:
    """Whether a module is torch's group norm with a weight and a bias, and no more."""
    return type(module) is nn.GroupNorm and module.affine and not is_changed(module)


def _is_silu(module: Any) -> bool:
    return type(module) is nn.SiLU and not is_changed(module)


def _is_residual_block(module: Any) -> bool:
    known = ("default", "scale_shift")
    return runs(module, ResnetBlock2D) and module.time_embedding_norm in known and _is_bare(module)


def _is_bare(block: Any) -> bool:
    """Whether the parts that a residual block no longer calls do nothing beside their work."""
    norms = is_group_norm(block.norm1) and is_group_norm(block.norm2)
    return norms and _is_silu(block.nonlinearity) and not is_changed(block.dropout)


def _residual_block(
    self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """[B, C, H, W], [B, E] -> [B, C', H', W']"""
    if not _is_bare(self):
        return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)  # type: ignore
    x = dense(input_tensor)
    first = group_norm(self.norm1, x, silu=True)
    resample = self.downsample if self.upsample is None else self.upsample
    if resample is None:
        hidden = convolution_behind(*first, self.conv1)
    else:
        x, hidden = resample(x), self.conv1(resample(value_of(*first)))
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden = _second_half(self, hidden, temb)
    else:
        hidden = _second_half(self, hidden if temb is None else hidden + temb, None)
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x)
    output = x + hidden
    return output if self.output_scale_factor == 1 else output / self.output_scale_factor


def _second_half(block: Any, hidden: Tensor, embedding: Any) -> Tensor:
    """Norm with the time embedding, SiLU, dropout and convolution."""
    if block.time_embedding_norm == "scale_shift":
        scale, shift = embedding[:, :, None, None].chunk(2, dim=1)
        hidden = value_of(*group_norm(block.norm2, hidden))
        hidden = block.nonlinearity(hidden * (1 + scale) + shift)
        return block.conv2(block.dropout(hidden))
    second = group_norm(block.norm2, hidden, embedding, silu=True)
    if is_idle(block.dropout):
        return convolution_behind(*second, block.conv2)
    return block.conv2(block.dropout(value_of(*second)))


def _has_spatial_input(module: Any) -> bool:
    if not isinstance(module, Transformer2DModel) or not module.is_input_continuous:
        return False
    return is_group_norm(module.norm) and "_operate_on_continuous_inputs" not in vars(module)


def _spatial_input(self: Any, hidden_states: Tensor) -> tuple[Tensor, int]:
    """[B, C, H, W] -> [B, H W, C'] and C'"""
    if not is_group_norm(self.norm):
        return Transformer2DModel._operate_on_continuous_inputs(self, hidden_states)
    if self.use_linear_projection:
        source = group_norm(self.norm, hidden_states, tokens=True)
        hidden = linears_behind(*source, [self.proj_in])[0]
        return hidden, hidden.shape[-1]
    hidden = convolution_behind(*group_norm(self.norm, hidden_states), self.proj_in)
    return hidden.flatten(2).transpose(1, 2).contiguous(), hidden.shape[1]


def _replace_spatial_input(module: Any) -> Undo:
    method = _spatial_input.__get__(module)
    return replace_attribute(module, "_operate_on_continuous_inputs", method)


def _has_output_norm(module: Any) -> bool:
    if not isinstance(module, (UNet2DModel, UNet2DConditionModel)):
        return False
    return is_group_norm(module.conv_norm_out) and _is_silu(module.conv_act)


def _replace_output_norm(module: Any) -> Undo:
    return in_turn(
        replace_forward(module.conv_norm_out, _normed_and_activated),
        replace_forward(module.conv_act, _same),
    )


def _normed_and_activated(self: Any, x: Tensor) -> Tensor:
    return value_of(*group_norm(self, x, silu=True))


def _same(self: Any, x: Tensor) -> Tensor:
    return x


PATCHES = (
    Patch(
        "residual_block",
        "ResnetBlock2D: group norm, SiLU and time embedding in one op; no division by 1",
        _is_residual_block,
        lambda module: replace_forward(module, _residual_block),
    ),
    Patch(
        "spatial_input",
        "Transformer2DModel: group norm that its projection does not keep",
        _has_spatial_input,
        _replace_spatial_input,
    ),
    Patch(
        "output_norm",
        "U-Nets: the last group norm and its SiLU in one op",
        _has_output_norm,
        _replace_output_norm,
    ),
)
