"""Teachers with random weights, the real architectures and schedulers, and a few thousand weights.

    sdxl  sd15  pixart  sd3  dit  edm_classes  edm

each in a folder as diffusers' pipelines save it, with encoded sets of random latents and
embeddings that fit it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from fastdistill.engine.encoded_writer import EncodedWriter

CLASSES = 5
ROWS = 24


def sdxl() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )


def sd15() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
    )


def pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        caption_channels=12,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=CLASSES,
    )


def _edm(**options: Any) -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        **options,
    )


def edm_classes() -> Any:
    return _edm(num_class_embeds=CLASSES)


def edm() -> Any:
    return _edm()


_STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_SCHEDULERS: dict[str, Any] = {
    "sdxl": lambda: diffusers.EulerDiscreteScheduler(**_STABLE, steps_offset=1),
    "sd15": lambda: diffusers.PNDMScheduler(**_STABLE, steps_offset=1, skip_prk_steps=True),
    "pixart": lambda: diffusers.DPMSolverMultistepScheduler(**_LINEAR),
    "sd3": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dit": lambda: diffusers.DDIMScheduler(**_LINEAR, clip_sample=False),
    "edm": diffusers.EDMEulerScheduler,
    "edm_classes": diffusers.EDMEulerScheduler,
}
_PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "sd15": "StableDiffusionPipeline",
    "pixart": "PixArtAlphaPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "dit": "DiTPipeline",
}
_TEXT: dict[str, dict[str, tuple[int, ...]]] = {
    "sdxl": {"encoder_hidden_states": (7, 12), "text_embeds": (8,), "time_ids": (6,)},
    "sd15": {"encoder_hidden_states": (7, 12)},
    "pixart": {"encoder_hidden_states": (7, 12), "encoder_attention_mask": (7,)},
    "sd3": {"encoder_hidden_states": (7, 12), "pooled_projections": (8,)},
}
KINDS = list(_SCHEDULERS)


def save_teacher(kind: str, folder: Path, vae: bool = False) -> Path:
    """A pipeline's folder with a random network that predicts something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = globals()[kind]()
        for parameter in model.parameters():  # last layers begin at zero, which would hide much
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    part = "unet" if "UNet" in type(model).__name__ else "transformer"
    scheduler = _SCHEDULERS[kind]()
    model.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": _PIPELINES.get(kind, "DDPMPipeline"),
        part: ["diffusers", type(model).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    if vae:
        small = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
        small.save_pretrained(folder / "vae")
        index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_data(kind: str, folder: Path, samples: bool = True, without: str = "") -> Path:
    """An encoded set of random latents and embeddings, or labels."""
    generator = torch.Generator().manual_seed(1)
    channels = {"sd3": 16, "edm": 3, "edm_classes": 3}.get(kind, 4)
    shape = (channels, 8, 8)
    tensors: dict[str, Tensor] = {}
    if samples:
        tensors["samples"] = torch.randn(ROWS, *shape, generator=generator)
    null: dict[str, Tensor] = {}
    classes = CLASSES if kind in ("dit", "edm_classes") else 0
    if classes:
        tensors["labels"] = torch.randint(classes, (ROWS,), generator=generator)
        null["labels"] = torch.tensor([classes])
    for name, size in _TEXT.get(kind, {}).items():
        if name == without:
            continue
        if name == "encoder_attention_mask":
            tensors[name] = (torch.arange(7) < torch.arange(ROWS)[:, None] % 6 + 2).long()
            null[name] = (torch.arange(7) < 1).long()[None]
        elif name == "time_ids":
            tensors[name] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).expand(ROWS, -1)
        else:
            tensors[name] = torch.randn(ROWS, *size, generator=generator)
            null[name] = torch.zeros(1, *size)
    writer = EncodedWriter(folder, ROWS, shape, classes=classes, null=null, shard_size=ROWS)
    writer.write(0, tensors)
    assert writer.finish()
    return folder
