"""Architecture configurations of published models: the numbers that diffusers builds them from.

Each JSON file is what ``config.json`` of the published model says about its architecture, so that a
network can be planned, benchmarked or built with fresh weights where no weights are at hand:

    sdxl, sd15                          UNet2DConditionModel
    dit_xl2_256, dit_xl2_512            DiTTransformer2DModel
    pixart_alpha_512, pixart_alpha_1024 PixArtTransformer2DModel
    sd3_medium, sd35_medium             SD3Transformer2DModel
    flux_dev                            FluxTransformer2DModel
    edm_imagenet64                      UNet2DModel, EDM's ADM as diffusers holds it
    edm_cifar10                         UNet2DModel, the nearest that it can be to EDM's DDPM++
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def known_configurations() -> list[str]:
    """Names that `model_configuration` knows."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def model_configuration(name: str) -> dict[str, Any]:
    """The diffusers configuration of a published model, ``_class_name`` included.

    Raises:
        ValueError: for a name that no file has, with the nearest one that has.
    """
    known = known_configurations()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1) or known
        raise ValueError(f"no configuration of a model {name!r}; did you mean {', '.join(near)}?")
    return json.loads((_FOLDER / f"{name}.json").read_text())
