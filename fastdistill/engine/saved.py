"""Saved denoisers: a folder with weights (safetensors), what they mean (JSON) and checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdistill.config import (
    ModelSettings,
    ParametrisationChoice,
    ProcessChoice,
    Recipe,
    _Settings,
)
from fastdistill.engine.folder import check_folder, commit_folder, read_document
from fastdistill.engine.shards import read_tensors
from fastdistill.models import Denoiser
from fastdistill.models.digits import DigitsNetwork


class DenoiserDescription(_Settings):
    """What is needed to rebuild a denoiser before its weights are loaded."""

    model: ModelSettings
    shape: tuple[int, ...]
    classes: int
    process: ProcessChoice
    parametrisation: ParametrisationChoice
    times: tuple[float, ...] | None = None
    """A student's times from the noisiest on; None for a denoiser that is sampled by an ODE."""

    @classmethod
    def of(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> DenoiserDescription:
        """The description of a recipe's teacher."""
        return cls(
            model=recipe.model,
            shape=shape,
            classes=classes,
            process=recipe.process,
            parametrisation=recipe.parametrisation,
        )

    def build(self, seed: int = 0) -> Denoiser:
        """A denoiser with fresh weights, which depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = DigitsNetwork(self.shape, self.classes, self.model.width, self.model.blocks)
        return Denoiser(network, self.process, self.parametrisation)


class SavedDenoiser(NamedTuple):
    """A denoiser read from a folder."""

    denoiser: Denoiser
    description: DenoiserDescription


def save_denoiser(folder: Path, denoiser: Denoiser, description: DenoiserDescription) -> None:
    """Write ``model.safetensors`` and ``config.json``, whole or not at all."""
    documents: dict[str, Any] = {"config": description.model_dump(mode="json")}
    commit_folder(folder, {"model": denoiser.network.state_dict()}, documents)


def load_denoiser(folder: Path | str, device: torch.device | str = "cpu") -> SavedDenoiser:
    """Read what `save_denoiser` wrote, in evaluation mode.

    Raises:
        DamagedFolderError: for a folder that is not whole.
        ValueError: for weights that do not fit the description.
    """
    folder = Path(folder)
    check_folder(folder)
    description = DenoiserDescription.model_validate(read_document(folder, "config"))
    denoiser = description.build()
    try:
        denoiser.network.load_state_dict(read_tensors(folder, "model"))
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from error
    return SavedDenoiser(denoiser.to(device).eval(), description)
