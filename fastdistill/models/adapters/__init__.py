"""Adapters: diffusers models and plain callables as networks of a `Denoiser`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdistill.models.adapters.base import Adapter
from fastdistill.models.adapters.dit import DiTAdapter
from fastdistill.models.adapters.flux import FluxAdapter
from fastdistill.models.adapters.pixart import PixArtAdapter
from fastdistill.models.adapters.plain import CallableAdapter
from fastdistill.models.adapters.sd3 import SD3Adapter
from fastdistill.models.adapters.unet import UNetAdapter, UNetConditionAdapter

ADAPTERS: dict[str, type[Adapter]] = {
    kind.architecture: kind
    for kind in (
        UNetConditionAdapter,
        UNetAdapter,
        DiTAdapter,
        PixArtAdapter,
        SD3Adapter,
        FluxAdapter,
    )
}
"""Adapters by the name of the diffusers class."""


def adapt(
    model: Any,
    features: Sequence[int | str] | None = None,
    sample_size: int | tuple[int, int] | None = None,
) -> Adapter | CallableAdapter:
    """The adapter of a diffusers model, or of a callable as `CallableAdapter` takes.

    Args:
        model: a diffusers model of a class in `ADAPTERS`, or any other callable of (model_input,
            noise_condition, condition), which has no features.
        features: names or indices of the blocks whose outputs a discriminator reads.
        sample_size: height and width of the samples where the model's configuration does not say.

    Raises:
        ValueError: for a diffusers model of another class or with an option that is not supported.
    """
    kind = ADAPTERS.get(type(model).__name__)
    if kind is not None:
        return kind(model, features, sample_size)
    if hasattr(model, "register_to_config") or not callable(model):
        raise ValueError(f"there is no adapter for {type(model).__name__}; {_known()}")
    if features is not None:
        raise ValueError(f"features is {features!r}, but a plain callable has none")
    return CallableAdapter(model)


def build_network(
    model_config: Any,
    features: Sequence[int | str] | None = None,
    sample_size: int | tuple[int, int] | None = None,
) -> Adapter:
    """A network with fresh weights from a diffusers configuration, on the device of the context.

    Args:
        model_config: the configuration, with ``_class_name``.
        features: as in `adapt`.
        sample_size: as in `adapt`.

    Raises:
        ValueError: for a class that has no adapter.
    """
    name = model_config.get("_class_name")
    if name not in ADAPTERS:
        raise ValueError(f"the model's configuration says _class_name {name!r}; {_known()}")
    model = diffusers_class(name).from_config(dict(model_config))
    return ADAPTERS[name](model, features, sample_size)


def diffusers_class(name: str) -> Any:
    """A class of diffusers by its name.

    Raises:
        ImportError: where diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("diffusers models need diffusers: pip install diffusers") from error
    return getattr(diffusers, name)


def _known() -> str:
    return f"expected one of {', '.join(ADAPTERS)}"


__all__ = [
    "ADAPTERS",
    "Adapter",
    "CallableAdapter",
    "adapt",
    "build_network",
    "diffusers_class",
]
