"""`Prefetched`: the next batches of a data set, made ready before the step asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.data.base import Data, RealBatch


class _Call(NamedTuple):
    """The arguments of `Data.batch`, as a key."""

    seed: int
    step: int
    size: int
    share: tuple[Any, Any, Any]

    def next(self, ahead: int = 1) -> _Call:
        return self._replace(step=self.step + ahead)


class _Ready(NamedTuple):
    batch: RealBatch
    copied: torch.cuda.Event | None
    """When the batch is on the device."""


class Prefetched:
    """A data set whose next batches are made in threads and copied to the device beside the step.

    A batch is a function of (seed, step), so the next calls are known: the same seed, count and
    share, and the following steps. A call that was not foreseen, as the first after a resume or
    one of an evaluation, is computed at once and disturbs nothing; two such calls in a row begin
    a new sequence. Batches are those of the data set, bit for bit.

    Copies to a GPU go from page-locked memory over a stream of their own, and the caller's
    stream, not the host, waits for them.

    Args:
        data: the data set, on the CPU, whose `batch` several threads may call at once.
        device: where batches are wanted.
        depth: batches that are ready or being made.
        workers: threads that make them, a batch each.

    Attributes:
        batches: calls answered.
        foreseen: how many of them had been foreseen.
        waited_seconds: how long the caller waited for batches, altogether.
    """

    def __init__(
        self,
        data: Data,
        device: torch.device | str = "cpu",
        *,
        depth: int = 3,
        workers: int = 2,
    ) -> None:
        if depth < 1 or workers < 1:
            raise ValueError(f"depth is {depth} and workers {workers}; expected at least one")
        self.data, self.device, self.depth = data, torch.device(device), depth
        self.batches, self.foreseen, self.waited_seconds = 0, 0, 0.0
        self._threads = ThreadPoolExecutor(workers, "prefetch")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._waiting: dict[_Call, Future[_Ready]] = {}
        self._last: _Call | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.data.shape

    @property
    def classes(self) -> int:
        """Number of classes of the data set; 0 without labels."""
        return getattr(self.data, "classes", 0)

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        begin = time.perf_counter()
        call = _Call(seed, step, count, (share.start, share.stop, share.step))
        foreseen = self._waiting.pop(call, None)
        if foreseen is not None or not self._waiting or self._last == call.next(-1):
            self._foresee(call)
        self._last = call
        ready = self._make(call) if foreseen is None else foreseen.result()
        self.batches += 1
        self.foreseen += foreseen is not None
        batch = self._hand_over(ready)
        self.waited_seconds += time.perf_counter() - begin
        return batch

    def close(self) -> None:
        """End the threads; batches that were foreseen are dropped."""
        self._drop(self._waiting)
        self._threads.shutdown()

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _foresee(self, call: _Call) -> None:
        """Let the calls after this one, and nothing else, be made ready."""
        coming = [call.next(ahead) for ahead in range(1, self.depth + 1)]
        self._drop(set(self._waiting) - set(coming))
        for one in coming:
            if one not in self._waiting:
                self._waiting[one] = self._threads.submit(self._make, one)

    def _drop(self, calls: Any) -> None:
        for call in list(calls):
            self._waiting.pop(call).cancel()

    def _make(self, call: _Call) -> _Ready:
        batch = self.data.batch(call.seed, call.step, call.size, slice(*call.share))
        if self._stream is None:
            return _Ready(RealBatch(*(_map(part, self._move) for part in batch)), None)
        with torch.cuda.stream(self._stream):
            moved = RealBatch(*(_map(part, self._move) for part in batch))
            return _Ready(moved, self._stream.record_event())

    def _move(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; what one row stands for, as a null condition, as one row."""
        if tensor.dim() and len(tensor) > 1 and tensor.stride(0) == 0:
            return self._move(tensor[:1]).expand_as(tensor)
        if self._stream is not None and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _hand_over(self, ready: _Ready) -> RealBatch:
        """Let the caller's stream wait for the copies, and own what they wrote."""
        if ready.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready.copied)
            for part in ready.batch:
                _map(part, lambda tensor: tensor.record_stream(stream))
        return ready.batch


def _map(part: Any, function: Callable[[Tensor], Any]) -> Any:
    """A function of every tensor of samples or conditions."""
    if isinstance(part, dict):
        return {name: function(value) for name, value in part.items()}
    return None if part is None else function(part)
