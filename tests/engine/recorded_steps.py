"""A CUDA graph as far as a CPU has one: the ops of a step, recorded and run again.

`RecordedCapture.capture` records every op with its very tensors and numbers, and takes back what it
changed, as a capture on a GPU runs nothing. A replay runs the same ops on the same tensors, so that
it goes wrong where a graph would: a number of the host that changes from step to step, a tensor
that moves, state that only Python keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Recorder(TorchDispatchMode):
    """Keeps (op, args, kwargs, results) of every op, and storages as they were before a write."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Callable[..., Any], tuple, dict, list[Any]]] = []
        self._before: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        # A graph holds no copy from pageable memory, as torch.tensor([...]) on a GPU would make.
        assert name not in ("lift_fresh", "_local_scalar_dense", "nonzero"), name
        given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        for argument in function._schema.arguments:
            # Exchanges between ranks do not say which tensors they write.
            if function.namespace == "c10d" or getattr(argument.alias_info, "is_write", False):
                for written in _tensors(given.get(argument.name)):
                    self._keep(written)
        results = function(*args, **kwargs)
        self.ops.append((function, args, kwargs, pytree.tree_leaves(results)))
        return results

    def _keep(self, written: Tensor) -> None:
        storage = written.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key not in self._before:
            whole = written.new_empty(0).set_(storage)
            self._before[key] = (whole, whole.clone())

    def take_back(self) -> None:
        """Undo every write."""
        for whole, before in reversed(self._before.values()):
            whole.copy_(before)

    def run_again(self) -> None:
        for function, args, kwargs, results in self.ops:
            found = pytree.tree_leaves(function(*args, **kwargs))
            for mine, fresh in zip(results, found, strict=True):
                if not isinstance(mine, Tensor):
                    _wait(fresh)
                elif mine.data_ptr() != fresh.data_ptr():
                    mine.copy_(fresh)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _wait(result: Any) -> None:
    """Wait for an exchange between ranks, as the kernels after it do on a GPU's streams."""
    if hasattr(result, "wait"):
        result.wait()


class RecordedCapture:
    """Stands in for `fastdistill.engine.graphs.CudaCapture`."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def warm_up(self, step: Callable[[], None]) -> None:
        self.events.append("warm-up")
        step()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.events.append("capture")
        with _Recorder() as recorder:
            step()
        recorder.take_back()

        def replay() -> None:
            self.events.append("replay")
            with torch.no_grad():
                recorder.run_again()

        return replay
