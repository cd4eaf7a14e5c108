"""A recipe as something to be planned: its networks on the meta device, its data as shapes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from fastdistill.choices import DigitsModel, MLPModel
from fastdistill.config import Recipe
from fastdistill.data import RealBatch
from fastdistill.diffusion import EDM, VP, EDMPreconditioning, Epsilon, Flow, RectifiedFlow
from fastdistill.engine.inputs import own_data
from fastdistill.engine.planning import PlannedJob
from fastdistill.engine.roles import checkpoint_blocks, make_objective
from fastdistill.engine.saved import own_network
from fastdistill.layers import accelerate
from fastdistill.models import Denoiser
from fastdistill.models.adapters import build_network
from fastdistill.models.configs import known_configurations, model_configuration
from fastdistill.objectives import Objective

TEXT_TOKENS = {
    "PixArtTransformer2DModel": 120,
    "SD3Transformer2DModel": 333,  # 77 of CLIP and 256 of T5
    "FluxTransformer2DModel": 512,
}
"""Text tokens that the models' pipelines give by default; 77 in all others."""

_KINDS: dict[str, tuple[Any, Any]] = {
    "UNet2DModel": (EDM(), EDMPreconditioning()),
    "SD3Transformer2DModel": (RectifiedFlow(), Flow()),
    "FluxTransformer2DModel": (RectifiedFlow(), Flow()),
}


def job_of_recipe(
    recipe: Recipe,
    model_config: str | Path | None = None,
    *,
    text_tokens: int | None = None,
) -> PlannedJob:
    """What is planned for a recipe; no weights and no data are read.

    Args:
        recipe: what will be run.
        model_config: a diffusers model's or pipeline's folder, a JSON file, or the name of a
            published model, as sdxl; what the recipe says if None.
        text_tokens: tokens of a prompt's embedding; those of the model's pipeline if None.

    Raises:
        ValueError: where there is no configuration, or one that cannot be read.
    """
    if isinstance(recipe.model, DigitsModel | MLPModel) and model_config is None:
        return _own_job(recipe)
    config = _configuration(recipe, model_config)
    options = {name: getattr(recipe.model, name, None) for name in ("features", "sample_size")}
    kind = config["_class_name"]
    process, parametrisation = _KINDS.get(kind, (VP.stable_diffusion(), Epsilon()))
    low = torch.bfloat16 if recipe.training.precision == "bfloat16" else torch.float32
    with torch.device("meta"):
        example = build_network(config, **options)
    tokens = text_tokens or TEXT_TOKENS.get(kind, 77)

    def teacher() -> Denoiser:
        network = build_network(config, **options)
        if recipe.training.accelerate:
            accelerate(network)
        return Denoiser(
            network,
            getattr(recipe, "process", None) or process,
            getattr(recipe, "parametrisation", None) or parametrisation,
        )

    def inputs(batch: int) -> RealBatch:
        make = functools.partial(
            example.example_condition, batch, text_tokens=tokens, dtype=low, device="meta"
        )
        guided = recipe.objective.guidance_scale != 1
        return RealBatch(
            _samples(recipe, batch, example.sample_shape), make(), make() if guided else None
        )

    return PlannedJob(
        functools.partial(_objective, recipe, teacher),
        recipe.training,
        recipe.parallel,
        example.sample_shape,
        inputs,
    )


def _own_job(recipe: Recipe) -> PlannedJob:
    """A job whose networks are made in the run, for data that are at hand."""
    model, data = recipe.model, own_data(recipe, torch.device("cpu"))
    shape, classes = data.shape, data.classes
    assert isinstance(model, DigitsModel | MLPModel)

    def teacher() -> Denoiser:
        network = own_network(model, shape, classes)
        return Denoiser(
            network, recipe.process or EDM(), recipe.parametrisation or EDMPreconditioning()
        )

    def inputs(batch: int) -> RealBatch:
        labels = torch.zeros(batch, dtype=torch.int64, device="meta") if classes else None
        return RealBatch(_samples(recipe, batch, shape), labels, labels)

    make = functools.partial(_objective, recipe, teacher)
    return PlannedJob(make, recipe.training, recipe.parallel, shape, inputs)


def _objective(recipe: Recipe, teacher: Any, checkpointed: bool) -> Objective:
    with torch.device("meta"):
        objective = make_objective(recipe, teacher())
    if checkpointed:
        checkpoint_blocks(objective)
    return objective


def _samples(recipe: Recipe, batch: int, shape: tuple[int, ...]) -> torch.Tensor | None:
    if not recipe.objective.needs_real:
        return None
    return torch.empty(batch, *shape, device="meta")


def _configuration(recipe: Recipe, given: str | Path | None) -> dict[str, Any]:
    """The diffusers configuration of the recipe's model."""
    source = given
    teacher = recipe.teacher.path
    if source is None and teacher is not None and Path(teacher).exists():
        source = teacher
    if source is None:
        source = getattr(recipe.model, "config", None)
    if source is None:
        raise ValueError(
            f"recipe {recipe.name} does not say its architecture: give teacher=FOLDER, "
            "model.config=NAME, or --model-config with a folder, a JSON file or one of "
            f"{', '.join(known_configurations())}"
        )
    path = Path(source)
    if path.is_dir():
        path = _config_in(path)
    elif not path.is_file():
        return model_configuration(str(source))
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or "_class_name" not in config:
        raise ValueError(f"{path} is no diffusers configuration: it has no _class_name")
    return config


def _config_in(folder: Path) -> Path:
    for part in ("", "unet", "transformer"):
        path = folder / part / "config.json"
        if path.is_file():
            return path
    raise ValueError(
        f"{folder} has no config.json, neither in unet/ nor in transformer/; expected a diffusers "
        "model or pipeline"
    )
