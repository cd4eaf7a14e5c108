"""What a person hands to the `fastdistill.Trainer`, as the engine's own: teacher and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from fastdistill.data import Data, EncodedData, ImageData, InMemoryData, Prefetched, RealBatch
from fastdistill.data.dataset import DatasetData
from fastdistill.data.encoded import INDEX
from fastdistill.models import Condition, Denoiser
from fastdistill.models.adapters import Adapter, adapt


@dataclasses.dataclass(frozen=True)
class Given:
    """A teacher, and where its pipeline is."""

    denoiser: Denoiser
    source: str | None
    """The pipeline's folder or its name on the Hub; None where nobody said."""


def as_teacher(teacher: Any, device: torch.device) -> Given:
    """A frozen teacher in float32 from what `fastdistill.Trainer` takes as one.

    Raises:
        ValueError: for anything else.
    """
    from fastdistill.models.pretrained import load_pretrained

    if isinstance(teacher, Denoiser):
        return Given(teacher.to(device), None)
    if isinstance(teacher, (str, Path)):
        return Given(load_pretrained(teacher, device=device).denoiser, str(teacher))
    if isinstance(teacher, tuple) and len(teacher) == 2:
        return Given(_denoiser(*teacher).to(device), None)
    parts = [getattr(teacher, name, None) for name in ("unet", "transformer")]
    model = next((part for part in parts if part is not None), None)
    if model is None or not hasattr(teacher, "scheduler"):
        raise ValueError(
            f"teacher is a {type(teacher).__name__}; expected a pipeline of diffusers, its folder "
            "or its name on the Hub, a pair (model, scheduler), or a Denoiser"
        )
    source = getattr(teacher.config, "_name_or_path", None)
    return Given(_denoiser(model, teacher.scheduler).to(device), source or None)


def _denoiser(model: Any, scheduler: Any) -> Denoiser:
    """A diffusers model with the process and parametrisation of its scheduler."""
    from fastdistill.models.pretrained import parametrisation_of, process_of

    network = adapt(model)
    if not hasattr(scheduler, "config") or not isinstance(network, Adapter):
        raise ValueError(
            f"({type(model).__name__}, {type(scheduler).__name__}) is no model of diffusers with "
            "its scheduler; give a Denoiser, which says process and parametrisation itself"
        )
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    model_config = {**model.config, "_class_name": type(model).__name__}
    return Denoiser(
        network, process_of(config, network.tokens), parametrisation_of(config, model_config)
    )


def as_data(
    data: Any,
    teacher: Denoiser,
    device: torch.device,
    uncondition: Condition = None,
    guided: bool = False,
) -> Data:
    """Data whose batches are on the device, from what `fastdistill.Trainer` takes as such.

    Args:
        data: see there.
        teacher: whose conditions they are.
        device: where batches are wanted.
        uncondition: the null condition, one row [1, ...] of each part; the data's own or the
            network's if None.
        guided: whether a null condition is needed.

    Raises:
        ValueError: for anything else, and for data that do not fit the teacher.
    """
    network = teacher.network
    shape = network.sample_shape if hasattr(network, "sample_shape") else None
    given = _open(data, network, shape, device)
    if shape is not None and tuple(given.shape) != tuple(shape):
        raise ValueError(
            f"the data's samples have shape {list(given.shape)}; the teacher's have {list(shape)}"
        )
    found = _WithNull(given, network, uncondition, device, guided)
    first = found.batch(0, 0, 1)
    if hasattr(network, "check_condition"):
        network.check_condition(first.condition, 1)
    return found


def _open(data: Any, network: Any, shape: Any, device: torch.device) -> Data:
    if data is None:
        raise ValueError("data is missing: prompts' embeddings, labels, latents or images")
    if hasattr(data, "batch") and hasattr(data, "shape"):
        return data
    if isinstance(data, Tensor):
        return InMemoryData(data.float().to(device))
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(x, Tensor) for x in data):
        return InMemoryData(data[0].float().to(device), data[1].long().to(device))
    if isinstance(data, (str, Path)):
        return Prefetched(_open_folder(Path(data), network, shape), device)
    if isinstance(data, (Dataset, DataLoader)):
        return Prefetched(DatasetData.of(data, shape), device)
    raise ValueError(
        f"data is a {type(data).__name__}; expected a folder, a tensor of samples, a pair "
        "(samples, labels), a torch Dataset or DataLoader, or an object with shape and batch()"
    )


def _open_folder(folder: Path, network: Any, shape: Any) -> Data:
    if (folder / INDEX).is_file():
        return EncodedData(folder)
    if shape is None:
        raise ValueError(f"{folder} holds images, but the teacher does not say their size")
    return ImageData(folder, shape[-1], classes=getattr(network, "classes", 0) or None)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A function of every tensor of a condition; None stays None."""
    return pytree.tree_map(lambda leaf: None if leaf is None else function(leaf), tree)


class _WithNull:
    """Data with the teacher's null condition where they have none, on the device."""

    def __init__(
        self,
        data: Data,
        network: Any,
        uncondition: Condition,
        device: torch.device,
        guided: bool,
    ) -> None:
        self.data, self._network, self._device, self._guided = data, network, device, guided
        self._null = map_tensors(lambda leaf: leaf.to(device), uncondition)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        given = self.data.batch(seed, step, count, share)
        samples, condition, uncondition = (
            map_tensors(lambda leaf: leaf.to(self._device), part) for part in given
        )
        if self._null is not None:
            uncondition = self._expand(condition)
        elif isinstance(condition, Tensor) and getattr(self._network, "null_condition", None):
            # The data cannot know how many classes there are beyond those that it has.
            uncondition = self._network.null_condition(condition)
        elif uncondition is None and self._guided:
            uncondition = self._own_null(condition)
        return RealBatch(samples, condition, uncondition)

    def _expand(self, condition: Condition) -> Condition:
        """The null row for every sample; parts that it lacks, as sizes, are each sample's own."""
        if isinstance(condition, Mapping):
            return {
                name: self._null[name].expand_as(value) if name in self._null else value
                for name, value in condition.items()
            }
        return self._null.expand_as(condition)

    def _own_null(self, condition: Condition) -> Condition:
        if not hasattr(self._network, "null_condition") or condition is None:
            raise ValueError(
                "guidance needs a null condition, which neither data nor network have; give "
                "uncondition="
            )
        return self._network.null_condition(condition)
