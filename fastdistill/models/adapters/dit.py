"""`DiTTransformer2DModel`: class-conditional DiT (Peebles & Xie 2022, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.models.adapters.base import OUTPUT, TransformerAdapter
from fastdistill.models.denoiser import Condition


class DiTAdapter(TransformerAdapter):
    """Condition: class labels int64 [B]; the label ``classes`` is the null class."""

    architecture = "DiTTransformer2DModel"
    # The output layer asks the first block's embedding of time and class, too.
    called_apart = ("model.transformer_blocks.0.norm1.emb",)

    def __init__(self, model: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(model, *arguments, **keywords)
        self.classes = self.config["num_embeds_ada_norm"]

    def null_condition(self, condition: Condition) -> Condition:
        return torch.full_like(condition, self.classes)

    def _arguments(self, model_input: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        return {"hidden_states": model_input, "timestep": t, "class_labels": condition}

    def _walk(
        self, model_input: Tensor, t: Tensor, condition: Condition
    ) -> Iterator[tuple[str, Tensor]]:
        model, grid = self.model, self._grid(model_input.shape)
        hidden = model.pos_embed(model_input)
        for name, block in zip(self._block_names(), model.transformer_blocks, strict=True):
            hidden = self._call(block, hidden, timestep=t, class_labels=condition)
            yield name, self._as_map(hidden, grid)
        embedding = model.transformer_blocks[0].norm1.emb(t, condition, hidden_dtype=hidden.dtype)
        shift, scale = model.proj_out_1(F.silu(embedding)).chunk(2, dim=1)
        hidden = model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]
        yield OUTPUT, self._unpatchify(model.proj_out_2(hidden), grid)
