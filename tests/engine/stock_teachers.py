"""Teachers' pipelines: the real architectures, reduced, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
import transformers

WIDTH = 32
"""Width of text embeddings."""


def _random(model):
    """Every weight random, since fresh models have zeros where something would show."""
    generator = torch.Generator().manual_seed(len(list(model.parameters())))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise)
    return model.eval()


def _vae(latent_channels: int = 4, **options):
    return _random(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=16,
            **options,
        )
    )


def _tokenizer(folder: Path):
    """A CLIP tokenizer of single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{one}</w>" for one in letters)]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def _clip(kind, projection: int = WIDTH):
    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projection,
        bos_token_id=0,
        eos_token_id=1,
    )
    return _random(kind(config))


def _t5(width: int):
    """A T5 encoder, and a tokenizer of words."""
    config = transformers.T5Config(
        vocab_size=16, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<unk>", "a", "of", "lighthouse", "photograph"]
    backend = Tokenizer(
        models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return _random(transformers.T5EncoderModel(config)), tokenizer


def _unet(**options):
    return _random(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            **options,
        )
    )


def stable_diffusion(folder: Path) -> None:
    unet = _unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
    )
    diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=_vae(),
        text_encoder=_clip(transformers.CLIPTextModel),
        tokenizer=_tokenizer(folder.with_name("letters")),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            skip_prk_steps=True,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def sdxl(folder: Path) -> None:
    unet = _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    tokenizer = _tokenizer(folder.with_name("letters"))
    diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(),
        text_encoder=_clip(transformers.CLIPTextModel),
        text_encoder_2=_clip(transformers.CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
    ).save_pretrained(folder)


def dit(folder: Path) -> None:
    transformer = _random(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            sample_size=8,
            in_channels=4,
            out_channels=8,
        )
    )
    diffusers.DiTPipeline(
        transformer=transformer, vae=_vae(), scheduler=diffusers.DDIMScheduler(), id2label={0: "a"}
    ).save_pretrained(folder)


def pixart(folder: Path) -> None:
    transformer = _random(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            sample_size=8,
            caption_channels=WIDTH,
            cross_attention_dim=16,
            out_channels=8,
        )
    )
    encoder, tokenizer = _t5(WIDTH)
    diffusers.PixArtAlphaPipeline(
        transformer=transformer,
        vae=_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)


def sd3(folder: Path) -> None:
    transformer = _random(
        diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8,
        )
    )
    tokenizer = _tokenizer(folder.with_name("letters"))
    encoder, words = _t5(2 * WIDTH)
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae(shift_factor=0.1),
        text_encoder=_clip(transformers.CLIPTextModelWithProjection),
        text_encoder_2=_clip(transformers.CLIPTextModelWithProjection),
        text_encoder_3=encoder,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=words,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)


def flux(folder: Path) -> None:
    transformer = _random(
        diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
    )
    encoder, words = _t5(WIDTH)
    diffusers.FluxPipeline(
        transformer=transformer,
        vae=_vae(shift_factor=0.1),
        text_encoder=_clip(transformers.CLIPTextModel),
        text_encoder_2=encoder,
        tokenizer=_tokenizer(folder.with_name("letters")),
        tokenizer_2=words,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).save_pretrained(folder)


def pixels(folder: Path) -> None:
    unet = _random(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        )
    )
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder)


TEACHERS = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": sdxl,
    "DiTPipeline": dit,
    "PixArtAlphaPipeline": pixart,
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
    "DDPMPipeline": pixels,
}
