"""`EncodedData`: samples and conditions that were computed before the training.

index.json                  what the set holds, with the size and SHA-256 of every file
shard-00000.safetensors     rows of ``samples``, ``labels`` and conditions, by name
null.safetensors            the null condition, once: one row of each condition that has one

Samples are as the denoiser sees them: latents shifted and scaled, or pixels as uint8. Written by
`fastdistill.engine.encode`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.data.base import Order, RealBatch
from fastdistill.data.pixels import to_unit_range
from fastdistill.data.tensor_files import TensorFiles

INDEX = "index.json"
PLAN = "encode.json"
NULL = "null.safetensors"
FORMAT = 1


class EncodedData:
    """A folder that ``fastdistill encode`` made, read by rows.

    Conditions are int64 labels [B], or float32 embeddings (and integer masks) by the names of the
    model's arguments; None in a set of samples alone. The null condition is one stored row seen B
    times; conditions that have none, as SDXL's ``time_ids``, are each sample's own.

    Args:
        folder: the set.

    Attributes:
        shape: shape of one sample, as the denoiser sees it; of prompts too.
        classes: number of classes, which is the null class; 0 without labels.
        index: all that index.json says.

    Raises:
        ValueError: where the folder is no finished set, naming what is missing or does not fit.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        self.shape: tuple[int, ...] = tuple(self.index["shape"])
        self.classes: int = self.index["classes"]
        self._tensors = TensorFiles([self.folder / entry["file"] for entry in self.index["shards"]])
        self._names = sorted(name for name in self._tensors.shapes if name != "samples")
        self._null = _read_null(self.folder / NULL) if self._names else {}
        self._order = Order(len(self._tensors))
        self._check()

    def __len__(self) -> int:
        return len(self._tensors)

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        return self.rows(self._order.rows(seed, step, count)[share].tolist())

    def rows(self, rows: list[int]) -> RealBatch:
        """The samples with these numbers, as the source counts them."""
        condition = {name: self._condition(name, rows) for name in self._names}
        uncondition = {
            name: self._null[name].expand_as(value) if name in self._null else value
            for name, value in condition.items()
        }
        samples = self._samples(rows)
        if not condition:
            return RealBatch(samples)
        if "labels" in condition:
            return RealBatch(samples, condition["labels"], uncondition["labels"])
        return RealBatch(samples, condition, uncondition)

    def require(
        self,
        shape: Sequence[int] | None = None,
        conditions: Collection[str] | None = None,
        classes: int | None = None,
        samples: bool = False,
    ) -> None:
        """Check that the set fits a job, before it starts.

        Args:
            shape: shape of the denoiser's samples.
            conditions: names of the model's conditions; ``labels`` for class labels.
            classes: number of classes of the model.
            samples: whether real samples are needed, as for a GAN term.

        Raises:
            ValueError: saying what the set has and what is needed.
        """
        if shape is not None and tuple(shape) != self.shape:
            raise ValueError(
                f"{self.folder} has samples of shape {list(self.shape)}, but the model needs "
                f"{list(shape)}; encode again with the --size and --teacher of this model"
            )
        missing = sorted(set(conditions or ()) - set(self._names))
        if missing:
            raise ValueError(
                f"{self.folder} has no {', '.join(missing)}, which the model needs (it has "
                f"{', '.join(self._names) or 'no conditions'}); encode with this model as --teacher"
            )
        if classes is not None and classes != self.classes:
            raise ValueError(
                f"{self.folder} has labels of {self.classes} classes, but the model has {classes}"
            )
        if samples and "samples" not in self._tensors.shapes:
            raise ValueError(
                f"{self.folder} holds prompts alone, but real samples are needed; encode a source "
                "with images"
            )

    def _samples(self, rows: list[int]) -> Tensor | None:
        if "samples" not in self._tensors.shapes:
            return None
        samples = self._tensors.read("samples", rows, torch.float32)
        return to_unit_range(samples) if self._tensors.dtypes["samples"] == torch.uint8 else samples

    def _condition(self, name: str, rows: list[int]) -> Tensor:
        is_float = self._tensors.dtypes[name].is_floating_point
        return self._tensors.read(name, rows, torch.float32 if is_float else None)

    def _check(self) -> None:
        """That the files are of one set, and that labels are of its classes."""
        shapes, dtypes = self._tensors.shapes, self._tensors.dtypes
        found = shapes.get("samples", self.shape)
        if found != self.shape or len(self) != self.index["samples"]:
            raise ValueError(
                f"{self.folder} holds {len(self)} samples of shape {list(found)}, but its {INDEX} "
                f"says {self.index['samples']} of {list(self.shape)}"
            )
        for name, value in self._null.items():
            if name not in shapes or tuple(value.shape) != (1, *shapes[name]):
                raise ValueError(f"{self.folder / NULL}: {name} is not one row of the set's {name}")
        if "labels" not in dtypes:
            return
        labels = self._tensors.whole("labels")
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise ValueError(f"{self.folder}: labels are {labels.dtype}, expected int64, one each")
        wrong = ((labels < 0) | (labels >= self.classes)).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{self.folder}: sample {row} has label {int(labels[row])}; expected 0 to "
                f"{self.classes - 1}"
            )


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        if (folder / PLAN).is_file():
            raise ValueError(
                f"{folder} is not finished: repeat the `fastdistill encode` that began it, which "
                "continues at the next shard"
            )
        raise ValueError(
            f"{folder} is no encoded set: {INDEX} is missing; make one with `fastdistill encode`"
        )
    try:
        index = json.loads(path.read_text())
        number = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    if number != FORMAT:
        raise ValueError(f"{path} has format {number}; this version of fastdistill reads {FORMAT}")
    for entry in [*index["shards"], *([index["null"]] if index["null"] else [])]:
        file = folder / entry["file"]
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, expected {entry['bytes']}: it is "
                "truncated or altered; remove it and encode again, which makes this file alone"
            )
    return index


def _read_null(file: Path) -> dict[str, Tensor]:
    tensors = TensorFiles([file])
    return {
        name: tensors.read(name, [0], torch.float32 if dtype.is_floating_point else None)
        for name, dtype in tensors.dtypes.items()
    }
