"""Small transformers of the real architectures, and blocks of them, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn


class Built(NamedTuple):
    """A module in float64, inputs that have gradients, and inputs that have none."""

    module: nn.Module
    inputs: dict[str, Tensor]
    constants: dict[str, Any]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mask(batch: int, length: int) -> Tensor:
    """Text tokens that are there: fewer for each sample."""
    return (torch.arange(length) < torch.arange(length, 0, -2)[:batch, None]).long()


def _dit() -> Built:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=3, sample_size=8,
        num_embeds_ada_norm=10, out_channels=8,
    ).eval()  # fmt: skip
    constants = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 10])}
    return Built(model, {"hidden_states": normal(2, 4, 8, 8)}, constants)


def _pixart() -> Built:
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=8,
        cross_attention_dim=24, caption_channels=10, use_additional_conditions=True,
    )  # fmt: skip
    inputs = {"hidden_states": normal(2, 4, 8, 8), "encoder_hidden_states": normal(2, 5, 10)}
    sizes = {"resolution": torch.full((2, 2), 512.0), "aspect_ratio": torch.ones(2, 1)}
    constants = {"timestep": torch.tensor([3, 700]), "encoder_attention_mask": mask(2, 5)}
    return Built(model, inputs, constants | {"added_cond_kwargs": sizes})


def _sd3(**options: Any) -> Built:
    model = SD3Transformer2DModel(
        sample_size=8, num_layers=3, attention_head_dim=8, num_attention_heads=3,
        joint_attention_dim=12, caption_projection_dim=24, pooled_projection_dim=10,
        pos_embed_max_size=8, in_channels=4, out_channels=4, **options,
    )  # fmt: skip
    inputs = {"hidden_states": normal(2, 4, 8, 8), "encoder_hidden_states": normal(2, 5, 12)}
    inputs["pooled_projections"] = normal(2, 10)
    return Built(model, inputs, {"timestep": torch.tensor([3, 700])})


def _flux() -> Built:
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    inputs = {"hidden_states": normal(2, 16, 4), "encoder_hidden_states": normal(2, 5, 12)}
    inputs |= {"pooled_projections": normal(2, 10), "guidance": torch.full((2,), 3.5)}
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    constants = {"img_ids": places, "txt_ids": torch.zeros(5, 3)}
    return Built(model, inputs, constants | {"timestep": torch.tensor([0.25, 0.75])})


MODELS: dict[str, Callable[[], Built]] = {
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "sd35": lambda: _sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux": _flux,
}


def _dit_block() -> Built:
    block = BasicTransformerBlock(
        24, 2, 12, activation_fn="gelu-approximate", num_embeds_ada_norm=10, attention_bias=True,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    constants = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([1, 10])}
    return Built(block, {"hidden_states": normal(2, 9, 24)}, constants)


def _pixart_block() -> Built:
    block = BasicTransformerBlock(
        24, 2, 12, cross_attention_dim=24, activation_fn="gelu-approximate", attention_bias=True,
        num_embeds_ada_norm=10, norm_type="ada_norm_single", norm_elementwise_affine=False,
        norm_eps=1e-6,
    )  # fmt: skip
    inputs = {"hidden_states": normal(2, 9, 24), "encoder_hidden_states": normal(2, 5, 24)}
    bias = (1 - mask(2, 5)[:, None].float()) * -10000.0
    return Built(block, inputs | {"timestep": normal(2, 144)}, {"encoder_attention_mask": bias})


def _streams() -> dict[str, Tensor]:
    image, text, temb = normal(2, 9, 24), normal(2, 5, 24), normal(2, 24)
    return {"hidden_states": image, "encoder_hidden_states": text, "temb": temb}


def _sd3_block(**options: Any) -> Built:
    return Built(JointTransformerBlock(24, 3, 8, **options), _streams(), {})


def _flux_block(kind: type[nn.Module]) -> Built:
    places = torch.randint(9, (14, 3), generator=torch.Generator().manual_seed(3)).float()
    angles = FluxPosEmbed(10000, (2, 4, 2))(places)
    return Built(kind(24, 3, 8), _streams(), {"image_rotary_emb": angles})


BLOCKS: dict[str, Callable[[], Built]] = {
    "dit_block": _dit_block,
    "pixart_block": _pixart_block,
    "sd3_block": _sd3_block,
    "sd3_block_last": lambda: _sd3_block(context_pre_only=True),
    "sd35_block": lambda: _sd3_block(qk_norm="rms_norm"),
    "sd35_block_dual": lambda: _sd3_block(qk_norm="rms_norm", use_dual_attention=True),
    "flux_block": lambda: _flux_block(FluxTransformerBlock),
    "flux_single_block": lambda: _flux_block(FluxSingleTransformerBlock),
}


def build(name: str) -> Built:
    """A block or a model with weights that no norm leaves at 1."""
    torch.manual_seed(0)
    built = (MODELS.get(name) or BLOCKS[name])()
    built.module.double()
    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def outputs(module: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    found = module(**inputs)
    found = found.sample if hasattr(found, "sample") else found
    found = found if isinstance(found, tuple) else (found,)
    return tuple(value for value in found if value is not None)


def gradients(
    built: Built, dtype: torch.dtype, run: Callable[..., tuple[Tensor, ...]] = outputs
) -> dict[str, Tensor]:
    """Outputs, and gradients by input and parameter of fixed cotangents; a copy in ``dtype``."""
    module = copy.deepcopy(built.module).to(dtype)
    inputs = {name: value.to(dtype).requires_grad_() for name, value in built.inputs.items()}
    results = run(module, inputs | built.constants)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in results]
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves = [*inputs.values(), *parameters.values()]
    found = torch.autograd.grad(results, leaves, pulls, allow_unused=True)
    named = zip([*inputs, *parameters], found, strict=True)
    values = {f"output {index}": value.detach() for index, value in enumerate(results)}
    return values | {name: g for name, g in named if g is not None}
