"""The data of a run, checked against the networks that will see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdistill.choices import EncodedSet, ImageSet, LabelSet
from fastdistill.config import Recipe, RecipeError
from fastdistill.data import Data, Labels
from fastdistill.engine.saved import SavedDenoiser


def open_data(recipe: Recipe, teacher: SavedDenoiser, device: torch.device) -> Data:
    """The recipe's data, whose batches come on the device.

    Raises:
        RecipeError: where the recipe names no data, or such as the teacher cannot take.
        ValueError: for data that cannot be read.
    """
    settings, description = recipe.data, teacher.description
    if isinstance(settings, LabelSet):
        if not description.classes:
            raise RecipeError(
                "data labels is for class-conditional networks, and the teacher has no classes; "
                "choose data encoded or images"
            )
        return Labels(description.shape, description.classes, device)
    assert isinstance(settings, EncodedSet | ImageSet)
    if settings.path is None:
        raise RecipeError(
            f"recipe {recipe.name} needs data: make a set with `fastdistill encode`, and give "
            "data=FOLDER"
        )
    raise NotImplementedError


def open_encoded(folder: Path | str, device: torch.device, network: Any) -> Data:
    raise NotImplementedError
