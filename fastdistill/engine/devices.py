"""The device of a run."""

from __future__ import annotations

import torch

from fastdistill.config import RecipeError


def choose_device(name: str) -> torch.device:
    """The device of a recipe; auto is a GPU where there is one.

    Raises:
        RecipeError: for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs; use cpu, or "
            "install a CUDA build of torch"
        )
    return device
