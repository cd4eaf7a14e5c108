"""Small models of the real architectures, and layers of them, with random weights and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

Call = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _sd15() -> tuple[nn.Module, dict[str, Tensor]]:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return model, {"sample": normal(2, 4, 8, 8), "encoder_hidden_states": normal(2, 5, 24)}


def _sdxl() -> tuple[nn.Module, dict[str, Tensor]]:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 20,
        norm_num_groups=16,
    )
    inputs = {"sample": normal(2, 4, 8, 8), "encoder_hidden_states": normal(2, 5, 24)}
    return model, inputs | {"text_embeds": normal(2, 20), "time_ids": normal(2, 6)}


def _pixels(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=8,
        **options,
    )
    return model, {"sample": normal(2, 3, 8, 8)}


def call_unet(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    inputs = dict(inputs)
    added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
    if added:
        inputs["added_cond_kwargs"] = added
    timestep = torch.tensor([3, 700])
    return model(timestep=timestep, **inputs).sample


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "pixels": _pixels,
    "pixels_adm": lambda: _pixels(
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet"
    ),
}


def _residual(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    block = ResnetBlock2D(in_channels=32, temb_channels=24, groups=8, **options)
    return block, {"input_tensor": normal(2, 32, 6, 6), "temb": normal(2, 24)}


def _image_attention() -> tuple[nn.Module, dict[str, Tensor]]:
    attention = Attention(
        32, heads=4, dim_head=8, norm_num_groups=8, residual_connection=True, bias=True
    )
    return attention, {"hidden_states": normal(2, 32, 3, 4)}


def _block(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    block = BasicTransformerBlock(32, 4, 8, cross_attention_dim=24, **options)
    return block, {"hidden_states": normal(2, 9, 32), "encoder_hidden_states": normal(2, 5, 24)}


def _self_attending_block() -> tuple[nn.Module, dict[str, Tensor]]:
    block = BasicTransformerBlock(32, 4, 8, double_self_attention=True)
    return block, {"hidden_states": normal(2, 9, 32)}


def _transformer(linear: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    model = Transformer2DModel(
        4, 8, in_channels=32, cross_attention_dim=24, norm_num_groups=8,
        use_linear_projection=linear,
    )  # fmt: skip
    return model, {"hidden_states": normal(2, 32, 4, 3), "encoder_hidden_states": normal(2, 5, 24)}


LAYERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "residual": _residual,
    "residual_wider": lambda: _residual(out_channels=48),
    "residual_scaled": lambda: _residual(output_scale_factor=2.0),
    "residual_scale_shift": lambda: _residual(time_embedding_norm="scale_shift"),
    "residual_up": lambda: _residual(up=True),
    "residual_down": lambda: _residual(down=True),
    "attention_image": _image_attention,
    "block": _block,
    "block_self_attending": _self_attending_block,
    "transformer_linear": lambda: _transformer(True),
    "transformer_convolution": lambda: _transformer(False),
}


def call_layer(layer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = layer(**inputs)
    return output if isinstance(output, Tensor) else output.sample


def build(name: str) -> tuple[nn.Module, dict[str, Tensor], Call]:
    """A layer or a model in float64, with weights that no norm leaves at 1, and its inputs."""
    torch.manual_seed(0)
    module, inputs = (MODELS.get(name) or LAYERS[name])()
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module, inputs, call_unet if name in MODELS else call_layer


def gradients(
    module: nn.Module, inputs: dict[str, Tensor], call: Call, dtype: torch.dtype, **to: Any
) -> dict[str, Tensor]:
    """Output and gradients, by input and parameter, of a fixed cotangent; a copy in ``dtype``."""
    module = copy.deepcopy(module).to(dtype)
    module = module.to(**to) if to else module
    inputs = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    output = call(module, inputs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves = [*inputs.values(), *parameters.values()]
    found = torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
    named = zip([*inputs, *parameters], found, strict=True)
    return {"output": output.detach()} | {name: g for name, g in named if g is not None}
