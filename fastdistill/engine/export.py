"""Export: a student as a folder that diffusers loads and samples without fastdistill.

A folder is written under a partial name and renamed when it is whole. It holds what the teacher's
pipeline holds, with the student in the teacher's place and the scheduler that computes the
student's own sampler (`fastdistill.engine.stock_sampler`), and a model card with the call. A LoRA
student becomes a LoRA file and the scheduler, to be loaded onto the teacher's pipeline.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.engine.folder import dump_document, partial_name, write_file
from fastdistill.engine.model_card import Card, write_card
from fastdistill.engine.saved import load_denoiser
from fastdistill.engine.stock_pipeline import StockPipeline, stock_pipeline
from fastdistill.engine.stock_sampler import StockSampler, stock_sampler
from fastdistill.models import Denoiser
from fastdistill.models.adapters import Adapter
from fastdistill.models.lora import merge_lora as merge

_UNSAFE = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb")
"""Weights that are not copied: they are unpickled, or of no use to torch."""
_VARIANT = re.compile(r"(?<=model)\.\w+(?=\.safetensors$)|(?<=\.index)\.\w+(?=\.json$)")
"""The variant in a weights' name, as in model.fp16.safetensors, or in their index's."""


def export(
    run: str | Path,
    to: str | Path,
    *,
    teacher: str | Path | None = None,
    merge_lora: bool = False,
    guidance: float = 1.0,
) -> Path:
    """Write the student of a run as a pipeline folder of diffusers; see `export_pipeline`.

    Args:
        run: the run's folder, in which the student was saved.
        to: the new folder.
        teacher: the teacher's pipeline, where it is not where the run found it.
        merge_lora: write a LoRA student's weights into the model.
        guidance: the guidance scale that a model with embedded guidance was told.

    Raises:
        ValueError: for a run without a student; and what `export_pipeline` raises.
    """
    run = Path(run)
    if not (run / "student").is_dir():
        raise ValueError(f"{run} has no student/ yet; finish it with `fastdistill resume {run}`")
    student, description = load_denoiser(run / "student")
    if description.times is None:
        raise ValueError(f"{run / 'student'} is no student: it has no times to be sampled at")
    recipe, summary = run / "recipe.yaml", run / "summary.json"
    return export_pipeline(
        student,
        description.times,
        teacher or getattr(description.model, "source", None),
        to,
        merge_lora=merge_lora,
        guidance=guidance,
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        metrics=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
    )


def export_pipeline(
    student: Denoiser,
    times: Sequence[float],
    teacher: str | Path | None,
    target: str | Path,
    *,
    merge_lora: bool = False,
    guidance: float = 1.0,
    recipe: str = "",
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write a student as a pipeline folder of diffusers.

    Args:
        student: a denoiser whose network is an adapter of a diffusers model, with the weights that
            are to be exported.
        times: the student's times from the noisiest on.
        teacher: the teacher's pipeline: a folder, or a name on the Hub.
        target: the new folder.
        merge_lora: write a LoRA student's weights into the model, instead of a LoRA file.
        guidance: the guidance scale that a model with embedded guidance, as FLUX.1-dev, was told.
        recipe: how the student was made, as YAML, for the model card.
        metrics: numbers for the model card, by name.

    Returns:
        The folder.

    Raises:
        FileExistsError: where the target exists.
        ValueError: for a student that diffusers has no model, scheduler or pipeline for, and for a
            teacher that is not its teacher.
        OSError: if the disk is full or not writable; nothing is left behind.
    """
    if student.start is not None:
        raise ValueError(
            "the student starts from a Gaussian's marginal (start_noise), but diffusers' "
            "schedulers start from pure noise; sample it with `fastdistill sample`"
        )
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another folder, or remove it first")
    network = student.network
    if not isinstance(network, Adapter):
        raise ValueError(
            f"the student's network is a {type(network).__name__}, not an adapter of a "
            "diffusers model; diffusers could not load it"
        )
    sampler = stock_sampler(student.process, student.parametrisation, times)
    if teacher is None:
        raise ValueError(
            "nobody said where the teacher's pipeline is, whose other parts are exported too; give "
            "its folder or its name on the Hub (teacher, or --teacher)"
        )
    source = _teacher_folder(teacher)
    pipeline = stock_pipeline(source, network, sampler, guidance)
    has_lora = bool(getattr(network.model, "peft_config", None))
    as_lora = has_lora and not merge_lora
    if as_lora and not pipeline.loads_lora:
        raise ValueError(
            f"{pipeline.name} of diffusers loads no LoRA files; merge the weights into the model "
            "(merge_lora, or --merge-lora)"
        )
    partial = partial_name(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if as_lora:
            _write_lora(network.model, pipeline, partial)
        else:
            _write_model(_merged(network) if has_lora else network, partial / pipeline.component)
            _write_index(pipeline, sampler, partial)
            _copy_components(source, pipeline, partial)
        _write_scheduler(sampler, partial / "scheduler")
        base = str(source.resolve()) if Path(teacher).is_dir() else str(teacher)
        card = Card(target.name, base, pipeline, sampler, as_lora, recipe, dict(metrics or {}))
        write_card(card, partial / "README.md")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _teacher_folder(teacher: str | Path) -> Path:
    """The pipeline's folder, from the Hub where it is a name there."""
    if Path(teacher).is_dir():
        return Path(teacher)
    if isinstance(teacher, Path) or str(teacher).count("/") != 1:
        raise ValueError(f"{teacher} is no folder; expected the teacher's pipeline, or a Hub name")
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(str(teacher)))


def _merged(network: Adapter) -> Adapter:
    """A copy with the LoRA updates in the model's weights."""
    copied = copy.deepcopy(network)
    merge(copied)
    return copied


def _write_model(network: Adapter, folder: Path) -> None:
    """Write the model by its own class, from weights that share no memory with an arena."""
    model = network.model
    with torch.device("meta"):
        fresh = type(model).from_config(model.config)
    weights = {name: _own(value) for name, value in model.state_dict().items()}
    fresh.load_state_dict(weights, assign=True)
    fresh.save_pretrained(folder, safe_serialization=True)


def _write_lora(model: Any, pipeline: StockPipeline, folder: Path) -> None:
    """Write ``pytorch_lora_weights.safetensors`` as the pipeline's ``load_lora_weights`` reads it.

    Raises:
        ValueError: for a model with several adapters.
    """
    import diffusers
    from peft import get_peft_model_state_dict

    if len(model.peft_config) != 1:
        raise ValueError(f"the student has {len(model.peft_config)} LoRA adapters; expected one")
    (adapter,) = model.peft_config
    weights = get_peft_model_state_dict(model, adapter_name=adapter)
    options = {
        f"{pipeline.component}_lora_layers": {name: _own(weights[name]) for name in weights},
        f"{pipeline.component}_lora_adapter_metadata": model.peft_config[adapter].to_dict(),
    }
    getattr(diffusers, pipeline.name).save_lora_weights(folder, **options)


def _own(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _write_scheduler(sampler: StockSampler, folder: Path) -> None:
    """Write the scheduler by its own class, which adds the defaults of this diffusers."""
    import diffusers

    getattr(diffusers, sampler.scheduler).from_config(sampler.config).save_pretrained(folder)


def _write_index(pipeline: StockPipeline, sampler: StockSampler, folder: Path) -> None:
    index = pipeline.index | {"scheduler": ["diffusers", sampler.scheduler]}
    index.pop("_name_or_path", None)
    write_file(folder / "model_index.json", dump_document(index))


def _copy_components(source: Path, pipeline: StockPipeline, target: Path) -> None:
    """Copy what the pipeline has besides model and scheduler, by hard links where they can be."""
    for name in pipeline.others:
        if not (source / name).is_dir():
            raise ValueError(
                f"{source} is not whole: model_index.json names {name}, which is missing"
            )
        _copy_component(source / name, target / name)


def _copy_component(source: Path, target: Path) -> None:
    names = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    unsafe = {name for name in names if name.endswith(_UNSAFE)}
    if unsafe and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{source} has its weights in {min(unsafe)} alone, which is not safetensors; save the "
            "teacher's pipeline again with save_pretrained"
        )
    for name in sorted(names - unsafe):
        plain = _VARIANT.sub("", name)
        if plain == name or plain not in names:  # a variant takes the name of plain weights only
            (target / plain).parent.mkdir(parents=True, exist_ok=True)
            _link(source / name, target / plain)


def _link(source: Path, target: Path) -> None:
    """A hard link to the file that a cache's link points to, or a copy on another disk."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
