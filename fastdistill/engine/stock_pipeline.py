"""`StockPipeline`: the pipeline of diffusers that a student takes its teacher's place in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from fastdistill.engine.stock_sampler import StockSampler
from fastdistill.models.adapters import Adapter


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How one pipeline class is called."""

    inputs: str
    """Its first arguments in an example."""
    guided: bool = True
    """Whether it takes a guidance scale."""
    schedule: Literal["timesteps", "sigmas"] | None = "timesteps"
    """What it takes besides a number of steps."""
    takes_latents: bool = True
    takes_size: bool = True
    scales_start: bool = True
    """Whether it scales its noise as the scheduler asks once the steps are set."""
    loads_lora: bool = False
    options: str = ""
    """Further arguments that every call needs."""


_PROMPT = '"a photograph of a lighthouse"'
_KINDS = {
    "StableDiffusionPipeline": _Kind(_PROMPT, loads_lora=True),
    "StableDiffusionXLPipeline": _Kind(_PROMPT, loads_lora=True),
    "PixArtAlphaPipeline": _Kind(_PROMPT, options="use_resolution_binning=False"),
    "PixArtSigmaPipeline": _Kind(_PROMPT, options="use_resolution_binning=False"),
    "DiTPipeline": _Kind(
        "class_labels=[0]", schedule=None, takes_latents=False, takes_size=False, scales_start=False
    ),
    "StableDiffusion3Pipeline": _Kind(_PROMPT, schedule="sigmas", loads_lora=True),
    "FluxPipeline": _Kind(_PROMPT, schedule="sigmas", loads_lora=True, takes_latents=False),
    "ConsistencyModelPipeline": _Kind(
        "batch_size=1", guided=False, takes_size=False, scales_start=False
    ),
}
_PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "KarrasVePipeline", "ConsistencyModelPipeline")
"""Pipelines of a UNet2DModel alone. Only the last scales inputs and knows classes, as EDM needs."""


@dataclasses.dataclass(frozen=True)
class StockPipeline:
    """A pipeline of diffusers, and how its students are called."""

    name: str
    """Name of its class."""
    component: str
    """The student's place in it, as unet or transformer."""
    index: dict[str, Any]
    """model_index.json."""
    latents: tuple[int, ...]
    """Shape of one sample."""
    size: tuple[int, int] | None
    """Height and width of its images, where a call has to say them."""
    guidance: float
    """The guidance scale that a model with embedded guidance is told; 1 is none."""

    @property
    def others(self) -> list[str]:
        """Names of what it has besides model and scheduler."""
        return [
            name
            for name, value in self.index.items()
            if isinstance(value, list)
            and value[0] is not None
            and name not in (self.component, "scheduler")
        ]

    @property
    def kind(self) -> _Kind:
        """How it is called."""
        return _KINDS[self.name]

    @property
    def loads_lora(self) -> bool:
        """Whether it has ``load_lora_weights``."""
        return self.kind.loads_lora

    def call(self, sampler: StockSampler) -> list[str]:
        """Arguments of a call that computes the student's sampler, as source text."""
        kind = self.kind
        arguments = [kind.inputs]
        if sampler.schedule:
            arguments += [f"{name}={values}" for name, values in sampler.schedule.items()]
        if "timesteps" not in sampler.schedule:
            arguments.append(f"num_inference_steps={sampler.steps}")
        if kind.guided:
            arguments.append(f"guidance_scale={self.guidance}")
        if self.size is not None:
            arguments += [f"height={self.size[0]}", f"width={self.size[1]}"]
        if kind.options:
            arguments.append(kind.options)
        if not sampler.starts_itself:
            arguments.append("latents=latents")
        return arguments


def stock_pipeline(
    teacher: Path, network: Adapter, sampler: StockSampler, guidance: float
) -> StockPipeline:
    """The pipeline of a teacher's folder with a student in it, able to use this sampler.

    Raises:
        ValueError: for a folder that is no pipeline, or none of these, or has another model.
    """
    file, kind = teacher / "model_index.json", network.architecture
    if not file.is_file():
        raise ValueError(f"{teacher} is no pipeline of diffusers: {file.name} is missing")
    index = json.loads(file.read_text(encoding="utf-8"))
    name = index["_class_name"]
    if name in _PIXEL_PIPELINES:
        name = "ConsistencyModelPipeline"
        index = index | {"_class_name": name}
    if name not in _KINDS:
        raise ValueError(
            f"{teacher} is a {name}; students are exported to "
            f"{', '.join((*_KINDS, *_PIXEL_PIPELINES[:-1]))}"
        )
    places = [key for key, value in index.items() if value == ["diffusers", kind]]
    if len(places) != 1:
        raise ValueError(f"{teacher} is a {name} without a {kind}: it is not the student's teacher")
    _check_guidance(network, guidance)
    size = _stated_size(teacher, network)
    pipeline = StockPipeline(name, places[0], index, network.sample_shape, size, guidance)
    _check_call(pipeline, sampler)
    return pipeline


def _check_guidance(network: Adapter, guidance: float) -> None:
    """Only a model with embedded guidance is told a guidance scale."""
    embedded = network.config.get("guidance_embeds", False)
    if embedded and guidance == 1.0:
        raise ValueError(
            f"this {network.architecture} is told a guidance scale; say which one the student was "
            "trained with (guidance, or --guidance), as 3.5"
        )
    if not embedded and guidance != 1.0:
        raise ValueError(
            f"guidance is {guidance}, but this {network.architecture} is told none; the teacher's "
            "guidance is in the student's weights"
        )


def _stated_size(teacher: Path, network: Adapter) -> tuple[int, int] | None:
    """Height and width of images in pixels, where the pipeline would make others."""
    _, height, width = network.sample_shape
    configured = network.config.get("sample_size")
    if configured in (height, (height, width), [height, width]) and height == width:
        return None
    file, scale = teacher / "vae" / "config.json", 1
    if file.is_file():
        vae = json.loads(file.read_text(encoding="utf-8"))
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return height * scale, width * scale


def _check_call(pipeline: StockPipeline, sampler: StockSampler) -> None:
    """Raise ValueError where the pipeline cannot be told what the sampler needs."""
    name, kind = pipeline.name, pipeline.kind
    if sampler.scheduler.startswith("FlowMatch") != (kind.schedule == "sigmas"):
        raise ValueError(f"{name} of diffusers cannot use {sampler.scheduler}")
    if sampler.scheduler == "EulerDiscreteScheduler" and not kind.scales_start:
        raise ValueError(
            f"the student's time lies between two timesteps, and {name} of diffusers knows whole "
            "ones; train it at the nearest"
        )
    for argument, values in sampler.schedule.items():
        if kind.schedule != argument:
            raise ValueError(
                f"{name} of diffusers takes no {argument}, and its own steps are not the student's "
                f"{values}; students of equal steps, as 999, 749, 499, 249, need none"
            )
    if pipeline.size is not None and not kind.takes_size:
        raise ValueError(
            f"{name} of diffusers draws its model's own sample_size, not the student's "
            f"{pipeline.latents[1]}x{pipeline.latents[2]}"
        )
    latents = kind.takes_latents
    if name == "ConsistencyModelPipeline" and pipeline.latents[0] != 3:
        latents = False  # it asks for three channels
    if not sampler.starts_itself and not latents:
        raise ValueError(
            f"the student starts from noise of standard deviation {sampler.start:.4f}, and {name} "
            f"of diffusers, which starts from {sampler.own_start:.4f}, can be given no other"
        )
