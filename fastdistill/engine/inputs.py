"""The data of a run, checked against the networks that will see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdistill.choices import EncodedSet, ImageSet, LabelSet, MixtureSet
from fastdistill.config import Recipe, RecipeError
from fastdistill.data import (
    Data,
    EncodedData,
    ImageData,
    InMemoryData,
    Labels,
    MixtureData,
    Prefetched,
    digits,
)
from fastdistill.data.mixtures import correlated, ring
from fastdistill.diffusion import GaussianMixture
from fastdistill.engine.saved import SavedDenoiser


def own_data(recipe: Recipe, device: torch.device) -> InMemoryData | MixtureData:
    """The data of a recipe whose networks are made for them: digits, or a mixture."""
    if isinstance(recipe.data, MixtureSet):
        return MixtureData(make_mixture(recipe.data), device)
    return digits().to(device)


def make_mixture(settings: MixtureSet) -> GaussianMixture:
    """The mixture that a recipe's data section describes, on the CPU."""
    with torch.device("cpu"):  # also where a plan makes everything else on the meta device
        if settings.preset == "ring":
            return ring(settings.modes)
        return correlated(settings.modes, settings.dimensions)


def open_data(recipe: Recipe, teacher: SavedDenoiser, device: torch.device) -> Data:
    """The recipe's data, whose batches come on the device.

    Raises:
        RecipeError: where the recipe names no data, or such as the teacher cannot take.
        ValueError: for data that cannot be read, or lack what the teacher needs.
    """
    settings, network = recipe.data, teacher.denoiser.network
    shape, classes = teacher.description.shape, teacher.description.classes
    if isinstance(settings, LabelSet):
        if not classes:
            raise RecipeError(
                "data labels is for class-conditional networks, and the teacher has no classes; "
                "choose data encoded or images"
            )
        data: Data = Labels(shape, classes, device)
    else:
        assert isinstance(settings, EncodedSet | ImageSet)
        if settings.path is None:
            raise RecipeError(
                f"recipe {recipe.name} needs data: make a set with `fastdistill encode`, and give "
                "data=FOLDER"
            )
        if isinstance(settings, EncodedSet):
            needs_real = recipe.objective.needs_real
            data = open_encoded(settings.path, network, needs_real)
        else:
            data = _open_images(settings.path, settings.size, shape, classes)
        data = Prefetched(data, device)
    _check_conditions(recipe, data, network)
    return data


def open_encoded(folder: Path | str, network: Any, needs_real: bool = False) -> EncodedData:
    """An encoded set that holds what a network needs.

    Args:
        folder: the set.
        network: an adapter.
        needs_real: whether samples are needed, and not conditions alone.

    Raises:
        ValueError: saying what the set has and what is needed.
    """
    data = EncodedData(folder)
    needed = ["labels"] if network.classes else list(network.condition_shapes)
    data.require(network.sample_shape, needed, network.classes, needs_real)
    return data


def _open_images(path: str, size: int, shape: tuple[int, ...], classes: int) -> ImageData:
    data = ImageData(path, size, classes=classes or None)
    if data.shape != shape:
        raise RecipeError(
            f"images of {path} come as {list(data.shape)}, but the teacher's samples are "
            f"{list(shape)}; set data.size, or encode them for a teacher of latents"
        )
    if bool(data.classes) != bool(classes):
        found = [f"{count} classes" if count else "no classes" for count in (data.classes, classes)]
        raise RecipeError(f"{path} has {found[0]}, but the teacher has {found[1]}")
    return data


def _check_conditions(recipe: Recipe, data: Data, network: Any) -> None:
    """Let one sample's conditions be checked now, and not by the first step."""
    given = data.batch(recipe.seed, 0, 1)
    network.check_condition(given.condition, 1)
    if not recipe.objective.needs_null and recipe.teacher.guidance_scale == 1:
        return
    if network.classes:
        network.null_condition(given.condition)
    network.check_condition(given.uncondition, 1)
