"""What accelerated transformers save for the backward pass, at full size on the meta device.

Sizes before are those that `docs/layers.md` starts from; a piece is [T, C] of one sample.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from saved import saved_bytes

from fastdistill.layers import accelerate


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def time():
    return meta(1, dtype=torch.int64)


def dit():
    model = DiTTransformer2DModel(sample_size=64, num_embeds_ada_norm=1000, out_channels=8)
    return model, (meta(1, 4, 64, 64), time(), time())


def pixart():
    model = PixArtTransformer2DModel(sample_size=128, caption_channels=4096)
    added = {"resolution": meta(1, 2), "aspect_ratio": meta(1, 1)}
    args = (meta(1, 4, 128, 128), meta(1, 120, 4096), time(), added, None, None, meta(1, 120))
    return model, args


def sd3(**options):
    model = SD3Transformer2DModel(
        sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=192, **options,
    )  # fmt: skip
    return model, (meta(1, 16, 128, 128), meta(1, 333, 4096), meta(1, 2048), meta(1))


def sd35():
    return sd3(qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [(dit, 1.240, 0.691), (pixart, 5.719, 3.512), (sd3, 6.425, 3.390), (sd35, 11.024, 5.222)],
)
def test_gib_of_one_sample(make, before, after):
    with torch.device("meta"):
        model, args = make()
    model.to(torch.bfloat16)
    assert saved_bytes(model, lambda: model(*args)) / 2**30 == pytest.approx(before, abs=0.01)
    accelerate(model)
    assert saved_bytes(model, lambda: model(*args)) / 2**30 == pytest.approx(after, abs=0.01)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_of_dit_xl_saves_11_pieces_of_20(frozen):
    """x, q, k, v, attention's value and output, GELU's input (4 wide) and output's projection.

    Frozen, as a teacher whose input alone has a gradient: no gate and no weight needs anything.
    """
    with torch.device("meta"):
        block = BasicTransformerBlock(
            1152, 16, 72, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            attention_bias=True, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        )  # fmt: skip
    block.to(torch.bfloat16).requires_grad_(not frozen)
    x, labels, piece = meta(1, 1024, 1152).requires_grad_(), time(), 1024 * 1152 * 2
    call = lambda: block(x, timestep=time(), class_labels=labels)  # noqa: E731
    before = saved_bytes(block, call)
    accelerate(block)
    after = saved_bytes(block, call)
    most = 0.1 * piece  # vectors [C], and numbers of tokens and heads
    for found, pieces in ((before, 10 if frozen else 20), (after, 10 if frozen else 11)):
        assert 0 <= found - pieces * piece <= most
