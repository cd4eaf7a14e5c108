"""Pipelines with random weights and the real architectures, a few thousand parameters each."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIDE = 16
"""Height and width of the images; latents have half."""


def clip_tokenizer() -> transformers.CLIPTokenizer:
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {word: number for number, word in enumerate(words)}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> transformers.T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def clip(seed: int, width: int = 32, projection: int | None = None):
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=projection or width,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def t5(seed: int, width: int = 32):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return transformers.T5EncoderModel(config).eval()


def vae(seed: int = 0, **options) -> diffusers.AutoencoderKL:
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        **{"scaling_factor": 0.5, **options},
    ).eval()


def _unet(width: int, **options) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        **options,
    )


def stable_diffusion():
    return diffusers.StableDiffusionPipeline(
        vae(),
        clip(1),
        clip_tokenizer(),
        _unet(32),
        diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl():
    unet = _unet(
        64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae(scaling_factor=0.13),
        clip(1),
        clip(2, projection=24),
        clip_tokenizer(),
        clip_tokenizer(),
        unet,
        diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def pixart(sample_size: int = SIDE // 2):
    with torch.device("meta" if sample_size > 8 else "cpu"):
        transformer = diffusers.PixArtTransformer2DModel(
            sample_size=sample_size,
            num_layers=1,
            patch_size=2,
            attention_head_dim=4,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            caption_channels=32,
            cross_attention_dim=8,
            use_additional_conditions=sample_size == 8,
        )
    return diffusers.PixArtAlphaPipeline(
        t5_tokenizer(), t5(3), vae(), transformer, diffusers.DPMSolverMultistepScheduler()
    )


def stable_diffusion_3(with_t5: bool = True):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=56,
        out_channels=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.06),
        clip(1, projection=32),
        clip_tokenizer(),
        clip(2, projection=24),
        clip_tokenizer(),
        t5(3, 64) if with_t5 else None,
        t5_tokenizer() if with_t5 else None,
    )


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.1159, scaling_factor=0.3611),
        clip(1),
        clip_tokenizer(),
        t5(3),
        t5_tokenizer(),
        transformer,
    )


def dit(classes: int = 3):
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=SIDE // 2,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=classes,
    )
    return diffusers.DiTPipeline(
        transformer, vae(scaling_factor=0.18215), diffusers.DDIMScheduler()
    )


def save(pipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder
