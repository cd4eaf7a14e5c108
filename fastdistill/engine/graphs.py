"""`StepGraphs`: a whole training step as CUDA graphs, one for each kind of step.

A graph replays kernels with the addresses and the host's numbers of its capture. So that a step can
be replayed, everything that differs from step to step is written on the device before it: batches
into `StaticBatch`, the step into the noise keys, learning rates into device scalars. Weights,
gradients and optimizer state lie in arenas; metrics are summed on the device. What the host decides
(whose turn it is, whether a sample is generated, how many steps of backward simulation come first)
is the key of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 2
"""Steps of each kind before its capture: kernels are compiled, streams and buffers made."""


class Capture(Protocol):
    """How steps are run beside the usual way."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run a step as it will be captured."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record a step without running it, and return what replays it."""


class StepGraphs:
    """Runs steps: the first ones of each kind eagerly, then from a graph.

    Args:
        capture: makes graphs.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.clear()

    def run(self, kind: Hashable, step: Callable[[], None]) -> None:
        """Do one step.

        Args:
            kind: what determines the kernels that ``step`` launches.
            step: launches them, with tensors at the same addresses every time.
        """
        replay = self._replays.get(kind)
        if replay is None and self._seen.get(kind, 0) < WARM_UP:
            self._seen[kind] = self._seen.get(kind, 0) + 1
            self._capture.warm_up(step)
            return
        if replay is None:
            replay = self._replays[kind] = self._capture.capture(step)
        replay()

    def clear(self) -> None:
        """Forget all graphs, as after state was loaded to other addresses."""
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._seen: dict[Hashable, int] = {}


class CudaCapture:
    """CUDA graphs in one memory pool, since no two of them run at once.

    Args:
        device: the GPU.
        streams: side streams that a step forks to, as FSDP2's for communication, at the time of a
            capture; all of them join before it ends.
    """

    def __init__(
        self, device: torch.device, streams: Callable[[], Iterable[torch.cuda.Stream]]
    ) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._side_streams = streams

    def warm_up(self, step: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: a thread that writes a checkpoint may use the GPU meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            streams = list(self._side_streams())
            for stream in streams:
                stream.wait_stream(self._stream)
            step()
            for stream in streams:
                self._stream.wait_stream(stream)
        return graph.replay


def make_capture(
    device: torch.device, streams: Callable[[], Iterable[torch.cuda.Stream]]
) -> Capture:
    """How graphs are made on a device.

    Raises:
        ValueError: for a device that has none.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, but the run is on {device}; turn it off")
    return CudaCapture(device, streams)


class StaticBatch:
    """One micro-batch at addresses that stay, whatever tensors the data set hands out."""

    def __init__(self) -> None:
        self._held: Any = None

    def take(self, batch: Any) -> Any:
        """Copy a tree of tensors in, and return the tree of those that stay.

        Raises:
            ValueError: for other shapes or dtypes than at the first call.
        """
        leaves, spec = pytree.tree_flatten(batch)
        if self._held is None:
            held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._held = pytree.tree_unflatten(held, spec)
            return self._held
        held, held_spec = pytree.tree_flatten(self._held)
        if spec != held_spec or _forms(leaves) != _forms(held):
            raise ValueError(
                f"cuda_graph needs batches of one form; the first was {_forms(held)} and this one "
                f"is {_forms(leaves)}: pad them, or turn it off"
            )
        for mine, given in zip(held, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given, non_blocking=True)
        return self._held


def _forms(leaves: list[Any]) -> list[Any]:
    return [
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]
