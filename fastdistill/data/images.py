"""`ImageData`: a source of images (or arrays) as a data set, decoded in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fastdistill.data.base import Order, RealBatch
from fastdistill.data.pixels import Decoded, decode
from fastdistill.data.sources import Source, open_source


class Decoder:
    """Decodes records of a source in threads.

    Args:
        source: where records come from.
        size: height and width of the images.
        workers: threads.
    """

    def __init__(self, source: Source, size: int, workers: int = 4) -> None:
        self._source, self._size = source, size
        self._threads = ThreadPoolExecutor(workers, "decode")

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def decode(self, rows: Sequence[int]) -> list[Decoded]:
        """The records of these numbers, decoded."""
        return [future.result() for future in self._submit(rows)]

    def batches(self, batches: Sequence[Sequence[int]]) -> Iterator[list[Decoded]]:
        """One list after the other; the next is decoded while the caller has the last."""
        waiting: deque[list[Future[Decoded]]] = deque()
        for rows in batches:
            waiting.append(self._submit(rows))
            if len(waiting) > 1:
                yield [future.result() for future in waiting.popleft()]
        for futures in waiting:
            yield [future.result() for future in futures]

    def _submit(self, rows: Sequence[int]) -> list[Future[Decoded]]:
        return [self._threads.submit(self._decode, row) for row in rows]

    def _decode(self, row: int) -> Decoded:
        return decode(self._source.record(row), self._size)


class ImageData:
    """Images of a source, float32 [3, size, size] in [-1, 1], with the classes that it has.

    Float arrays, as latents in ``.npy``, are taken as they are. Captions are left alone: text is
    encoded before the training, by ``fastdistill encode``.

    Args:
        source: a `Source`, or a path that `open_source` knows.
        size: height and width.
        classes: number of classes; by default one more than the largest label.
        workers: threads that decode.

    Attributes:
        shape: shape of one sample.
        classes: number of classes, which is the null class; 0 without labels.

    Raises:
        ValueError: for a source without images, for labels out of range, and (in `batch`) naming
            an image that is broken.
    """

    def __init__(
        self,
        source: Source | Path | str,
        size: int,
        *,
        classes: int | None = None,
        workers: int = 4,
    ) -> None:
        self.source = open_source(source) if isinstance(source, (Path, str)) else source
        first = self.source.record(0)
        if first.content is None:
            raise ValueError(f"{first.name} is text alone; expected images")
        self.shape = tuple(decode(first, size).as_float().shape)
        self.classes = count_classes(self.source, classes)
        self._decoder = Decoder(self.source, size, workers)
        self._order = Order(len(self.source))

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        rows = self._order.rows(seed, step, count)[share]
        samples = stack(self._decoder.decode(rows.tolist()), self.shape)
        if self.source.labels is None:
            return RealBatch(samples)
        labels = self.source.labels[rows]
        return RealBatch(samples, labels, torch.full_like(labels, self.classes))


def stack(decoded: Sequence[Decoded], shape: tuple[int, ...]) -> Tensor:
    """Samples of one shape as a batch, float32 [B, ...].

    Raises:
        ValueError: naming the record that has another shape.
    """
    samples = [one.as_float() for one in decoded]
    for one, sample in zip(decoded, samples, strict=True):
        if tuple(sample.shape) != shape:
            raise ValueError(
                f"{one.record.name} has shape {list(sample.shape)}, expected {list(shape)}"
            )
    return torch.stack(samples)


def count_classes(source: Source, classes: int | None = None) -> int:
    """The number of classes; 0 without labels.

    Args:
        source: whose labels are counted.
        classes: the number that labels must stay below; one more than the largest label if None.

    Raises:
        ValueError: naming the first sample whose label is out of range.
    """
    if source.labels is None:
        return 0
    found = int(source.labels.max()) + 1
    if classes is None:
        return found
    if found > classes:
        row = int((source.labels >= classes).nonzero()[0])
        raise ValueError(
            f"{source.record(row).name} has label {int(source.labels[row])}; expected 0 to "
            f"{classes - 1}"
        )
    return classes
