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

    from fastdistill.models.configs import model_configuration

    with torch.device("meta"):
        network: Any = UNet2DConditionModel.from_config(model_configuration("sdxl"))
    return network


def sizes_like_sdxl(count: int) -> list[int]:
    """Elements of each of SDXL's tensors, scaled so that all together are ``count``."""
    sizes = [parameter.numel() for parameter in sdxl_unet().parameters()]
    scaled = [max(1, round(size * count / sum(sizes))) for size in sizes]
    scaled[scaled.index(max(scaled))] += count - sum(scaled)
    return scaled
