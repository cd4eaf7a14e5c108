"""Tiny diffusers models of the real architectures, with random weights and conditions for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from fastdistill.data import RealBatch
from fastdistill.diffusion import Uniform
from fastdistill.models import Denoiser
from fastdistill.models.adapters import Adapter, adapt
from fastdistill.models.pretrained import parametrisation_of, process_of
from fastdistill.objectives import (
    Discriminator,
    DistributionMatching,
    MatchingSettings,
    get_divergence,
)

_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_TEXT_UNET = _UNET | {"cross_attention_dim": 24, "attention_head_dim": 4}
_PIXART = {
    "num_attention_heads": 2,
    "in_channels": 4,
    "num_layers": 4,
    "sample_size": 8,
    "caption_channels": 12,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": (
        "UNet2DConditionModel",
        _TEXT_UNET
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        _TEXT_UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        },
    ),
    "unet": (
        "UNet2DModel",
        _UNET
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "dropout": 0.3,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 4,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        _PIXART | {"attention_head_dim": 8, "cross_attention_dim": 16},
    ),
    "pixart_sized": (
        "PixArtTransformer2DModel",
        _PIXART
        | {"attention_head_dim": 12, "cross_attention_dim": 24, "use_additional_conditions": True},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 8,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
}

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("PNDMScheduler", {"skip_prk_steps": True}),
    "sdxl": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "unet": ("EDMEulerScheduler", {}),
    "dit": ("DDIMScheduler", {}),
    "pixart": ("DPMSolverMultistepScheduler", {}),
    "pixart_sized": ("DPMSolverMultistepScheduler", {}),
    "sd3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flux": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
}
for _name in ("sd15", "sdxl"):
    SCHEDULERS[_name][1].update(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

FAMILIES = list(CONFIGS)
LAW = Uniform(0.1, 0.9)


def tiny_model(family: str, **changes: Any) -> Any:
    """A model whose every weight, zero-initialised ones too, is random."""
    name, config = CONFIGS[family]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**{**config, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.count_nonzero() == 0:
                nn.init.normal_(parameter, std=0.2)
    return model


def tiny_adapter(family: str, features: Any = None, **changes: Any) -> Adapter:
    size = 8 if family == "flux" else None
    adapter = adapt(tiny_model(family, **changes), features, size)
    assert isinstance(adapter, Adapter)
    return adapter


def scheduler(family: str) -> Any:
    name, config = SCHEDULERS[family]
    return getattr(diffusers, name)(**config)


def scheduler_config(family: str) -> dict[str, Any]:
    return json.loads(scheduler(family).to_json_string())


def tiny_denoiser(family: str, features: Any = None) -> Denoiser:
    adapter, config = tiny_adapter(family, features), scheduler_config(family)
    model_config = json.loads(adapter.model.to_json_string())
    process = process_of(config, adapter.tokens)
    return Denoiser(adapter, process, parametrisation_of(config, model_config))


def condition_of(adapter: Adapter, batch: int = 2, seed: int = 1, text_tokens: int = 5) -> Any:
    """A random condition."""
    generator = torch.Generator().manual_seed(seed)
    if adapter.classes:
        return torch.randint(adapter.classes, (batch,), generator=generator)
    condition = adapter.example_condition(batch, text_tokens=text_tokens)
    if condition is None:
        return None
    for name, value in condition.items():
        drawn = torch.randn(value.shape, generator=generator)
        whole = (100 * drawn.abs()).round()
        fixed = {"time_ids": whole, "resolution": whole, "guidance": torch.full_like(drawn, 3.5)}
        condition[name] = fixed.get(name, drawn)
    if "encoder_attention_mask" in condition:
        kept = torch.arange(text_tokens) < 3
        condition["encoder_attention_mask"] = kept.float().expand(batch, -1).contiguous()
    return condition


def uncondition(denoiser: Denoiser, condition: Any) -> Any:
    """Null class, zeros, or the embeddings of another prompt in the empty prompt's place."""
    try:
        return denoiser.network.null_condition(condition)
    except ValueError:
        return condition_of(denoiser.network, len(next(iter(condition.values()))), seed=8)


class Prompts:
    """The same conditions at every step, and real samples of unit variance."""

    def __init__(self, denoiser: Denoiser, size: int = 4) -> None:
        self.shape = denoiser.network.sample_shape
        self._condition = condition_of(denoiser.network, size)
        self._uncondition = uncondition(denoiser, self._condition)
        self._size = size

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        assert count == self._size
        samples = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(step))
        return RealBatch(samples, self._condition, self._uncondition)


def objective_of(
    teacher: Denoiser, student: Denoiser, critic: Denoiser, guided: bool, divergence: str
) -> DistributionMatching:
    """Matching with a GAN term, whose features are the critic's for reverse KL (DMD2)."""
    settings = MatchingSettings(
        divergence=get_divergence(divergence),
        guidance_scale=3.0 if guided else 1.0,
        gan_weight=0.01,
        gan_features="critic" if divergence == "reverse_kl" else "teacher",
    )
    last = teacher.process.time_of_position(torch.tensor(0.9)).item()
    return DistributionMatching(
        student, teacher, critic, [last], LAW, LAW,
        discriminator=Discriminator(teacher.network.feature_shapes), settings=settings,
    )  # fmt: skip


def save_pipeline(folder: Path, family: str, **changes: Any) -> Path:
    """A pipeline's folder with what fastdistill reads of it."""
    model = tiny_model(family, **changes)
    part = "unet" if "UNet" in type(model).__name__ else "transformer"
    model.save_pretrained(folder / part)
    scheduler(family).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiffusionPipeline",
        part: ["diffusers", type(model).__name__],
        "scheduler": ["diffusers", SCHEDULERS[family][0]],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
