"""`FluxTransformer2DModel`: FLUX.1, whose latents are packed two by two into tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdistill.models.adapters.base import (
    OUTPUT,
    Shape,
    TransformerAdapter,
    like,
    needs_text_encoder,
)
from fastdistill.models.denoiser import Condition

_TIME_SCALE = 1000
"""The model multiplies the time that it is given by this."""


class FluxAdapter(TransformerAdapter):
    """Conditions: encoder_hidden_states [B, T, D], pooled_projections [B, P], and guidance [B].

    The last is the guidance scale that a guidance-distilled model (FLUX.1-dev) is told. Samples are
    latents [B, C, H, W]; tokens and their positions are made here.
    """

    architecture = "FluxTransformer2DModel"

    @property
    def patch(self) -> int:
        return 2

    @property
    def condition_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {
            "encoder_hidden_states": (None, self.config["joint_attention_dim"]),
            "pooled_projections": (self.config["pooled_projection_dim"],),
        }
        return shapes | ({"guidance": ()} if self.config["guidance_embeds"] else {})

    def null_condition(self, condition: Condition) -> Condition:
        raise needs_text_encoder(self.architecture)

    def _raw(self, output: Tensor, model_input: Tensor) -> Tensor:
        """Tokens [B, N, 4 C] as latents [B, C, H, W]."""
        tokens = output.unflatten(2, (model_input.shape[1], 2, 2))
        tokens = tokens.unflatten(1, self._grid(model_input.shape))  # [B, h, w, C, 2, 2]
        return tokens.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def _pack(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] as tokens [B, N, 4 C]."""
        squares = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, h, 2, w, 2]
        return squares.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)

    def _arguments(self, model_input: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        text = like(condition["encoder_hidden_states"], model_input)
        height, width = self._grid(model_input.shape)
        rows, columns = (torch.arange(n, device=text.device) for n in (height, width))
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        return {
            "hidden_states": self._pack(model_input),
            "timestep": t / _TIME_SCALE,
            "encoder_hidden_states": text,
            "pooled_projections": like(condition["pooled_projections"], model_input),
            "guidance": condition.get("guidance"),
            "img_ids": torch.nn.functional.pad(places, (1, 0)).to(model_input.dtype),
            "txt_ids": text.new_zeros(text.shape[1], 3),
        }

    def _block_names(self) -> list[str]:
        single = range(len(self.model.single_transformer_blocks))
        return super()._block_names() + [f"single_transformer_blocks.{k}" for k in single]

    def _configured_size(self) -> int | tuple[int, int]:
        return 128  # latents of FLUX's 1024 pixels; the configuration does not say

    def _sample_channels(self) -> int:
        return self.config["in_channels"] // 4

    def _walk(
        self, model_input: Tensor, t: Tensor, condition: Condition
    ) -> Iterator[tuple[str, Tensor]]:
        model, grid = self.model, self._grid(model_input.shape)
        given = self._arguments(model_input, t, condition)
        hidden = model.x_embedder(given["hidden_states"])
        time = given["timestep"].to(hidden.dtype) * _TIME_SCALE
        embedded = [time, given["pooled_projections"]]
        if given["guidance"] is not None:
            embedded.insert(1, given["guidance"].to(hidden.dtype) * _TIME_SCALE)
        embedding = model.time_text_embed(*embedded)
        text = model.context_embedder(given["encoder_hidden_states"])
        rotary = model.pos_embed(torch.cat((given["txt_ids"], given["img_ids"])))
        blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
        for name, block in zip(self._block_names(), blocks, strict=True):
            text, hidden = self._call(
                block,
                hidden_states=hidden,
                encoder_hidden_states=text,
                temb=embedding,
                image_rotary_emb=rotary,
            )
            yield name, self._as_map(hidden, grid)
        yield OUTPUT, model.proj_out(model.norm_out(hidden, embedding))
