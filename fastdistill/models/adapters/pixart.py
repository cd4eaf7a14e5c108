"""`PixArtTransformer2DModel`: PixArt-alpha and -sigma (arXiv 2310.00426, 2403.04692)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastdistill.models.adapters.base import (
    OUTPUT,
    Shape,
    TransformerAdapter,
    like,
    needs_text_encoder,
)
from fastdistill.models.denoiser import Condition


class PixArtAdapter(TransformerAdapter):
    """Conditions: encoder_hidden_states [B, T, D] and encoder_attention_mask [B, T] of T5.

    Models that use additional conditions (PixArt-alpha at 1024 pixels) also need resolution [B, 2]
    (height and width in pixels) and aspect_ratio [B, 1].
    """

    architecture = "PixArtTransformer2DModel"

    @property
    def condition_shapes(self) -> dict[str, Shape]:
        config = self.config
        width = config["caption_channels"] or config["cross_attention_dim"]
        shapes: dict[str, Shape] = {
            "encoder_hidden_states": (None, width),
            "encoder_attention_mask": (None,),
        }
        if self.model.use_additional_conditions:
            shapes |= {"resolution": (2,), "aspect_ratio": (1,)}
        return shapes

    def null_condition(self, condition: Condition) -> Condition:
        raise needs_text_encoder(self.architecture)

    def _arguments(self, model_input: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        sizes = ("resolution", "aspect_ratio")
        needed = self.model.use_additional_conditions
        return {
            "hidden_states": model_input,
            "timestep": t,
            "encoder_hidden_states": like(condition["encoder_hidden_states"], model_input),
            "encoder_attention_mask": condition["encoder_attention_mask"],
            "added_cond_kwargs": {name: condition[name] if needed else None for name in sizes},
        }

    def _walk(
        self, model_input: Tensor, t: Tensor, condition: Condition
    ) -> Iterator[tuple[str, Tensor]]:
        model, grid = self.model, self._grid(model_input.shape)
        given = self._arguments(model_input, t, condition)
        mask = given["encoder_attention_mask"].to(model_input.dtype)
        bias = ((1 - mask) * -10000.0).unsqueeze(1)  # [B, 1, T]
        hidden, text = model.pos_embed(model_input), given["encoder_hidden_states"]
        modulation, embedding = model.adaln_single(
            t, given["added_cond_kwargs"], batch_size=len(hidden), hidden_dtype=hidden.dtype
        )
        if model.caption_projection is not None:
            text = model.caption_projection(text)
        for name, block in zip(self._block_names(), model.transformer_blocks, strict=True):
            hidden = self._call(
                block,
                hidden,
                encoder_hidden_states=text,
                encoder_attention_mask=bias,
                timestep=modulation,
            )
            yield name, self._as_map(hidden, grid)
        table = model.scale_shift_table[None] + embedding[:, None]
        shift, scale = table.chunk(2, dim=1)
        hidden = model.norm_out(hidden) * (1 + scale) + shift
        yield OUTPUT, self._unpatchify(model.proj_out(hidden), grid)
