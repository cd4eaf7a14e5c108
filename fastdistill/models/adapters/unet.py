"""UNets of diffusers: `UNet2DConditionModel` (SD 1.5, SDXL) and `UNet2DModel` (DDPM, EDM)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdistill.models.adapters.base import OUTPUT, Adapter, Shape, like, needs_text_encoder
from fastdistill.models.denoiser import Condition


class _UNet(Adapter):
    """What both UNets share: blocks down, a middle, blocks up, with skips between."""

    @property
    def block_shapes(self) -> dict[str, tuple[int, int, int]]:
        _, height, width = self.sample_shape
        sizes = [(height, width)]
        shapes = {}
        for k, block in enumerate(self.model.down_blocks):
            if block.downsamplers is not None:
                height, width = -(-height // 2), -(-width // 2)
                sizes.append((height, width))
            shapes[f"down_blocks.{k}"] = (block.resnets[-1].out_channels, height, width)
        if self.model.mid_block is not None:
            channels = self.model.mid_block.resnets[-1].out_channels
            shapes["mid_block"] = (channels, height, width)
        for k, block in enumerate(self.model.up_blocks):
            if block.upsamplers is not None:
                sizes.pop()
            shapes[f"up_blocks.{k}"] = (block.resnets[-1].out_channels, *sizes[-1])
        return shapes

    def _default_features(self) -> list[str]:
        """The middle block: the smallest maps with the widest view."""
        last = f"down_blocks.{len(self.model.down_blocks) - 1}"
        return ["mid_block" if self.model.mid_block is not None else last]

    def _sample_channels(self) -> int:
        return self.config["in_channels"]

    def _centred(self, model_input: Tensor) -> Tensor:
        return 2 * model_input - 1.0 if self.config["center_input_sample"] else model_input

    def _finish(self, hidden: Tensor) -> Tensor:
        model = self.model
        if model.conv_norm_out is not None:
            hidden = model.conv_act(model.conv_norm_out(hidden))
        return model.conv_out(hidden)

    def _refuse(self, found: dict[str, Any]) -> None:
        for option, value in found.items():
            if value:
                raise ValueError(
                    f"this {self.architecture} has {option} = {value!r}, which is not supported"
                )


class UNetConditionAdapter(_UNet):
    """`UNet2DConditionModel` of Stable Diffusion 1.x, 2.x and SDXL.

    Conditions: encoder_hidden_states [B, T, D]; with SDXL's added conditions also text_embeds
    [B, P] and time_ids [B, 6] (original height and width, crop's top and left, target height and
    width); with a guidance embedding (LCM) optionally timestep_cond [B, G].
    """

    architecture = "UNet2DConditionModel"

    def __init__(self, model: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(model, *arguments, **keywords)
        config = self.config
        added = config["addition_embed_type"]
        self._refuse(
            {
                "addition_embed_type": added if added != "text_time" else None,
                "encoder_hid_dim_type": config["encoder_hid_dim_type"],
                "class_embed_type": config["class_embed_type"],
                "num_class_embeds": config["num_class_embeds"],
                "time_embedding_act_fn": config["time_embedding_act_fn"],
            }
        )

    @property
    def is_sdxl(self) -> bool:
        """Whether the model has SDXL's added conditions."""
        return self.config["addition_embed_type"] == "text_time"

    @property
    def condition_shapes(self) -> dict[str, Shape]:
        width = self.config["cross_attention_dim"]
        shapes: dict[str, Shape] = {
            "encoder_hidden_states": (None, width if isinstance(width, int) else width[0])
        }
        if self.is_sdxl:
            joined = self.config["projection_class_embeddings_input_dim"]
            pooled = joined - 6 * self.config["addition_time_embed_dim"]
            shapes |= {"text_embeds": (pooled,), "time_ids": (6,)}
        return shapes

    @property
    def optional_conditions(self) -> dict[str, Shape]:
        width = self.config["time_cond_proj_dim"]
        return {} if width is None else {"timestep_cond": (width,)}

    def null_condition(self, condition: Condition) -> Condition:
        """SDXL's: zero embeddings (``force_zeros_for_empty_prompt``) with the same sizes."""
        self.check_condition(condition, len(condition["encoder_hidden_states"]))
        if not self.is_sdxl:
            raise needs_text_encoder(self.architecture)
        zeroed = {name: torch.zeros_like(condition[name]) for name in _EMBEDDINGS}
        return {**condition, **zeroed}

    def _arguments(self, model_input: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "sample": model_input,
            "timestep": t,
            "encoder_hidden_states": like(condition["encoder_hidden_states"], model_input),
        }
        if self.is_sdxl:
            pooled = like(condition["text_embeds"], model_input)
            added = {"text_embeds": pooled, "time_ids": condition["time_ids"]}
            arguments["added_cond_kwargs"] = added
        if "timestep_cond" in condition:
            arguments["timestep_cond"] = like(condition["timestep_cond"], model_input)
        return arguments

    def _walk(
        self, model_input: Tensor, t: Tensor, condition: Condition
    ) -> Iterator[tuple[str, Tensor]]:
        model, given = self.model, self._arguments(model_input, t, condition)
        text = given["encoder_hidden_states"]
        hidden = self._centred(model_input)
        embedding = model.time_embedding(
            model.get_time_embed(sample=hidden, timestep=t), given.get("timestep_cond")
        )
        if self.is_sdxl:
            embedding = embedding + model.get_aug_embed(
                emb=embedding,
                encoder_hidden_states=text,
                added_cond_kwargs=given["added_cond_kwargs"],
            )
        hidden = model.conv_in(hidden)
        skips: tuple[Tensor, ...] = (hidden,)
        for k, block in enumerate(model.down_blocks):
            hidden, states = block(hidden_states=hidden, temb=embedding, **_attended(block, text))
            skips += states
            yield f"down_blocks.{k}", hidden
        if model.mid_block is not None:
            hidden = model.mid_block(hidden, embedding, **_attended(model.mid_block, text))
            yield "mid_block", hidden
        for k, block in enumerate(model.up_blocks):
            count = len(block.resnets)
            used, skips = skips[-count:], skips[:-count]
            hidden = block(
                hidden_states=hidden,
                temb=embedding,
                res_hidden_states_tuple=used,
                upsample_size=skips[-1].shape[2:] if skips else None,
                **_attended(block, text),
            )
            yield f"up_blocks.{k}", hidden
        yield OUTPUT, self._finish(hidden)


class UNetAdapter(_UNet):
    """`UNet2DModel`: pixels without a condition, or with class labels int64 [B]."""

    architecture = "UNet2DModel"

    def __init__(self, model: Any, *arguments: Any, **keywords: Any) -> None:
        super().__init__(model, *arguments, **keywords)
        config = self.config
        kinds = (*config["down_block_types"], *config["up_block_types"])
        fourier = config["time_embedding_type"] == "fourier"
        self._refuse(
            {
                "time_embedding_type": "fourier" if fourier else None,
                "class_embed_type": config["class_embed_type"],
                "a block type": next((kind for kind in kinds if "Skip" in kind), None),
            }
        )
        self.classes = config["num_class_embeds"] or 0

    def null_condition(self, condition: Condition) -> Condition:
        if condition is None:
            return None
        raise ValueError(
            f"this {self.architecture} has {self.classes} classes and no null class; train it "
            "without guidance"
        )

    def _arguments(self, model_input: Tensor, t: Tensor, condition: Condition) -> dict[str, Any]:
        arguments = {"sample": model_input, "timestep": t}
        return arguments | ({"class_labels": condition} if self.classes else {})

    def _walk(
        self, model_input: Tensor, t: Tensor, condition: Condition
    ) -> Iterator[tuple[str, Tensor]]:
        model = self.model
        hidden = self._centred(model_input)
        embedding = model.time_embedding(model.time_proj(t).to(hidden.dtype))
        if self.classes:
            embedding = embedding + model.class_embedding(condition).to(hidden.dtype)
        hidden = model.conv_in(hidden)
        skips: tuple[Tensor, ...] = (hidden,)
        for k, block in enumerate(model.down_blocks):
            hidden, states = block(hidden_states=hidden, temb=embedding)
            skips += states
            yield f"down_blocks.{k}", hidden
        if model.mid_block is not None:
            hidden = model.mid_block(hidden, embedding)
            yield "mid_block", hidden
        for k, block in enumerate(model.up_blocks):
            count = len(block.resnets)
            used, skips = skips[-count:], skips[:-count]
            hidden = block(hidden, used, embedding)
            yield f"up_blocks.{k}", hidden
        yield OUTPUT, self._finish(hidden)


_EMBEDDINGS = ("encoder_hidden_states", "text_embeds")


def _attended(block: Any, text: Tensor) -> dict[str, Tensor]:
    attends = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": text} if attends else {}
