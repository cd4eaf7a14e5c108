"""`DatasetData`: a map-style torch dataset as a function of (seed, step)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastdistill.data.base import Order, RealBatch

SAMPLES = ("samples", "latents", "pixel_values", "images")
"""Names under which an item's sample is looked for."""


class DatasetData:
    """Items of a dataset, visited in a new order every epoch.

    An item is a sample, a pair (sample, label), or a dict with the sample under one of `SAMPLES`
    (absent where there are conditions alone) and either ``labels`` or the model's conditions under
    their names. Samples are as the denoiser sees them: latents shifted and scaled, pixels in
    [-1, 1].

    Args:
        dataset: has a length, and items by index.
        collate: joins items; torch's default if None.
        shape: shape of one sample, where items have none.

    Raises:
        ValueError: for a dataset without a length or items, and for items that are none of these.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"{type(dataset).__name__} has no items by index; the order of samples is a "
                "function of seed and step here, so an iterable dataset has to be stored first "
                "(`fastdistill encode` reads tar shards)"
            )
        self.dataset: Any = dataset
        self.collate = collate or default_collate
        self._order = Order(len(self.dataset))
        self._lock = threading.Lock()
        first = self.batch(0, 0, 1).samples
        if first is None and shape is None:
            raise ValueError(f"the items have no sample ({', '.join(SAMPLES)}), nor a shape=")
        self.shape = tuple(first.shape[1:] if first is not None else shape or ())

    @classmethod
    def of(cls, data: Dataset[Any] | DataLoader[Any], shape: Sequence[int]) -> DatasetData:
        """The data of a dataset, or of a loader, whose order and batch size are not used."""
        if isinstance(data, DataLoader):
            return cls(data.dataset, data.collate_fn, shape)
        return cls(data, None, shape)

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        rows = self._order.rows(seed, step, count)[share].tolist()
        with self._lock:  # datasets need not be made for several threads
            items = self.collate([self.dataset[row] for row in rows])
        if isinstance(items, Tensor):
            return RealBatch(items.float())
        if isinstance(items, Mapping):
            return self._from_names(dict(items))
        if isinstance(items, Sequence) and len(items) == 2:
            return RealBatch(items[0].float(), items[1].long())
        raise ValueError(
            f"an item of the dataset is a {type(self.dataset[0]).__name__}; expected a sample, a "
            "pair (sample, label), or a dict"
        )

    @staticmethod
    def _from_names(items: dict[str, Any]) -> RealBatch:
        found = [name for name in SAMPLES if name in items]
        if len(found) > 1:
            raise ValueError(f"an item of the dataset has {' and '.join(found)}; expected one")
        samples = items.pop(found[0]).float() if found else None
        texts = [name for name, value in items.items() if not isinstance(value, Tensor)]
        if texts:
            raise ValueError(
                f"{texts[0]} of the dataset's items is no tensor; embeddings of prompts are "
                "computed before the training, as by `fastdistill encode`"
            )
        if "labels" in items:
            return RealBatch(samples, items["labels"].long())
        return RealBatch(samples, items or None)
