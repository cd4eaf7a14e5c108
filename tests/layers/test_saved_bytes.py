"""What accelerated layers keep for the backward pass, counted on the meta device at full width."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from saved import saved_bytes

from fastdistill.layers import accelerate

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def before_and_after(model, call):
    """Bytes kept by the model as it was and accelerated."""
    before = saved_bytes(model, call)
    accelerate(model)
    return before, saved_bytes(model, call)


@pytest.mark.parametrize(("channels", "tokens"), [(640, 4096), (1280, 1024)])
def test_a_transformer_block_of_sdxl(channels, tokens):
    """Of its 28 pieces of [T, C]: norms' values (3), gate's value twice (8); 17 remain."""
    with torch.device("meta"):
        block = BasicTransformerBlock(channels, channels // 64, 64, cross_attention_dim=2048)
    block = block.bfloat16()
    x, text = meta(1, tokens, channels).requires_grad_(), meta(1, 77, 2048)
    piece = tokens * channels * 2
    before, after = before_and_after(block, lambda: block(x, encoder_hidden_states=text))
    beside = 6 * 77 * channels + 77 * 2048 * 2 + 100 * tokens  # of the text; a row's numbers
    assert 0 <= before - 28 * piece <= beside
    assert 0 <= after - 17 * piece <= beside


@pytest.mark.parametrize("channels", [320, 1280])
def test_a_residual_block_of_sdxl(channels):
    """x, and the first convolution's output, of six pieces."""
    with torch.device("meta"):
        block = ResnetBlock2D(in_channels=channels, temb_channels=1280)
    block = block.bfloat16()
    x, temb = meta(1, channels, 32, 32).requires_grad_(), meta(1, 1280)
    piece = channels * 32 * 32 * 2
    before, after = before_and_after(block, lambda: block(x, temb))
    assert 0 <= before - 6 * piece <= 0.05 * piece
    assert 0 <= after - 2 * piece <= 0.05 * piece


def test_the_whole_sdxl_at_1024_pixels():
    with torch.device("meta"):
        model = UNet2DConditionModel(**SDXL)
    model = model.bfloat16()
    sample, text = meta(1, 4, 128, 128), meta(1, 77, 2048)
    added = {"text_embeds": meta(1, 1280), "time_ids": meta(1, 6)}

    def call():
        model(sample, meta(1), encoder_hidden_states=text, added_cond_kwargs=added)

    before, after = (size / 2**30 for size in before_and_after(model, call))
    assert before == pytest.approx(6.42, abs=0.01)
    assert after == pytest.approx(3.74, abs=0.01)


def test_layers_with_lora_save_no_norm_and_no_gate_either():
    """The 17 pieces again, and the ranks' own: 16 wide beside 640 and 2560."""
    peft = pytest.importorskip("peft")
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj", "net.2"]
    with torch.device("meta"):
        block = BasicTransformerBlock(640, 10, 64, cross_attention_dim=2048).requires_grad_(False)
        config = peft.LoraConfig(r=16, target_modules=layers)
        block = peft.inject_adapter_in_model(config, block)
    block = block.bfloat16()
    x, text = meta(1, 4096, 640).requires_grad_(), meta(1, 77, 2048)
    before, after = before_and_after(block, lambda: block(x, encoder_hidden_states=text))
    piece = 4096 * 640 * 2
    assert before == pytest.approx(28.4 * piece, rel=0.01)
    assert after == pytest.approx(17.2 * piece, rel=0.01)
