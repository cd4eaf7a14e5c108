"""Networks whose sizes the benchmarks take; none has weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


@functools.cache
def sdxl_unet() -> nn.Module:
    """SDXL's U-Net on the meta device: 2,567,463,684 parameters in 1,680 tensors."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network: Any = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return network


def sizes_like_sdxl(count: int) -> list[int]:
    """Elements of each of SDXL's tensors, scaled so that all together are ``count``."""
    sizes = [parameter.numel() for parameter in sdxl_unet().parameters()]
    scaled = [max(1, round(size * count / sum(sizes))) for size in sizes]
    scaled[scaled.index(max(scaled))] += count - sum(scaled)
    return scaled
