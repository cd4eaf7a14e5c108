"""`SD3Transformer2DModel`: Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

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


class SD3Adapter(TransformerAdapter):
    """Conditions: encoder_hidden_states [B, T, D] and pooled_projections [B, P]."""

    architecture = "SD3Transformer2DModel"

    @property
    def condition_shapes(self) -> dict[str, Shape]:
        return {
            "encoder_hidden_states": (None, self.config["joint_attention_dim"]),
            "pooled_projections": (self.config["pooled_projection_dim"],),
        }

    def null_condition(self, condition: Condition) -> Condition:
        raise needs_text_encoder(self.architecture)

    def _arguments(self, model_input: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        return {
            "hidden_states": model_input,
            "timestep": t,
            "encoder_hidden_states": like(condition["encoder_hidden_states"], model_input),
            "pooled_projections": like(condition["pooled_projections"], model_input),
        }

    def _walk(
        self, model_input: Tensor, t: Tensor, condition: Condition
    ) -> Iterator[tuple[str, Tensor]]:
        model, grid = self.model, self._grid(model_input.shape)
        given = self._arguments(model_input, t, condition)
        hidden = model.pos_embed(model_input).contiguous()
        embedding = model.time_text_embed(t, given["pooled_projections"])
        text = model.context_embedder(given["encoder_hidden_states"])
        for name, block in zip(self._block_names(), model.transformer_blocks, strict=True):
            text, hidden = self._call(
                block, hidden_states=hidden, encoder_hidden_states=text, temb=embedding
            )
            yield name, self._as_map(hidden, grid)
        hidden = model.proj_out(model.norm_out(hidden, embedding))
        yield OUTPUT, self._unpatchify(hidden, grid)
