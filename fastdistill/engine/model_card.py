"""The model card of an exported student: what it is, how it is called, how it was made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import fastdistill
from fastdistill.engine.folder import write_file
from fastdistill.engine.stock_pipeline import StockPipeline
from fastdistill.engine.stock_sampler import StockSampler


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card says."""

    name: str
    """Name of the folder."""
    base: str
    """The teacher: a folder, or a name on the Hub."""
    pipeline: StockPipeline
    sampler: StockSampler
    is_lora: bool
    recipe: str
    """How the student was made, as YAML; may be empty."""
    metrics: dict[str, Any]
    """Numbers by name; may be empty."""


def write_card(card: Card, path: Path) -> None:
    """Write README.md with the header that the Hub reads."""
    steps = "one step" if card.sampler.steps == 1 else f"{card.sampler.steps} steps"
    if card.is_lora:
        what = f"LoRA weights that turn `{card.base}` into a generator of images in {steps}"
    else:
        what = f"A generator of images in {steps}, distilled from `{card.base}`"
    parts = [
        _header(card),
        f"# {card.name}",
        f"{what}; made by fastdistill {fastdistill.__version__}. It takes no guidance: the "
        "teacher's is in the weights.",
        f"## Use\n\n```python\n{snippet(card)}```",
        "The scheduler in this folder belongs to the student: others, and other numbers of steps, "
        "compute something else.",
    ]
    if card.metrics:
        rows = "".join(f"| {name} | {_short(value)} |\n" for name, value in card.metrics.items())
        parts.append(f"## Metrics\n\n| | |\n|---|---|\n{rows}".rstrip())
    if card.recipe:
        parts.append(f"## Recipe\n\n```yaml\n{card.recipe.rstrip()}\n```")
    write_file(path, "\n\n".join(parts) + "\n")


def _header(card: Card) -> str:
    """What the Hub reads, as YAML between two rules."""
    facts: dict[str, Any] = {"library_name": "diffusers", "tags": ["distillation", "fastdistill"]}
    if "class_labels" not in card.pipeline.kind.inputs and card.pipeline.kind.guided:
        facts["pipeline_tag"] = "text-to-image"
    if not Path(card.base).is_absolute():
        facts["base_model"] = card.base
    return "\n".join(["---", *(f"{key}: {json.dumps(facts[key])}" for key in facts), "---"])


def snippet(card: Card) -> str:
    """A program that draws one image, run where the folder lies."""
    pipeline, sampler = card.pipeline, card.sampler
    imports = ["DiffusionPipeline", *([sampler.scheduler] if card.is_lora else [])]
    lines = [f"from diffusers import {', '.join(imports)}", "import torch", ""]
    if card.is_lora:
        lines += [
            f'pipe = DiffusionPipeline.from_pretrained("{card.base}")',
            f'pipe.load_lora_weights("{card.name}")',
            f'pipe.scheduler = {sampler.scheduler}.from_pretrained("{card.name}", '
            'subfolder="scheduler")',
        ]
    else:
        lines.append(f'pipe = DiffusionPipeline.from_pretrained("{card.name}")')
    lines.append("generator = torch.manual_seed(0)")
    if not sampler.starts_itself:
        shape = ", ".join(str(number) for number in (1, *pipeline.latents))
        factor = repr(sampler.start / sampler.own_start)
        lines.append(f"latents = {factor} * torch.randn({shape}, generator=generator)")
    arguments = [*pipeline.call(sampler), "generator=generator"]
    lines += [
        "image = pipe(",
        *(f"    {argument}," for argument in arguments),
        ").images[0]",
        'image.save("sample.png")',
    ]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
