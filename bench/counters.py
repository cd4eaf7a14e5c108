"""What a training cycle asks of the device and of the host: kernels, waits, bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")
_NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "set_")


class Counts(NamedTuple):
    """Of one call."""

    kernels: int
    """Ops that compute or copy: no views, no allocations. A foreach op is one, though a GPU may
    take several launches for it."""
    waits: int
    """Values that the host reads, for which a GPU would have to finish first."""
    peak: int
    """Most bytes at once of tensors that the call made; what an op has within itself is unseen."""


class _Counter(TorchDispatchMode):
    def __init__(self, on_host: Iterable[Tensor]) -> None:
        super().__init__()
        self._on_host = {value.data_ptr() for value in on_host}
        self.kernels = self.waits = self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        first = next((v for v in pytree.tree_leaves(args) if isinstance(v, Tensor)), None)
        if first is not None and first.data_ptr() in self._on_host:
            pass
        elif name in _WAITS:
            self.waits += 1
        elif not (name in _NO_KERNEL or function.namespace == "profiler" or _is_view(function)):
            self.kernels += 1
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._known.add(value.untyped_storage())
        results = function(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(results):
            if isinstance(value, Tensor) and value.untyped_storage() not in self._known:
                self._add(value.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.live -= size


def _is_view(function: Any) -> bool:
    """Whether results are other shapes of the arguments' memory."""
    returned = [value.alias_info for value in function._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def count(run: Callable[[], Any], on_host: Iterable[Tensor] = ()) -> Counts:
    """Kernels, waits and memory of one call.

    Args:
        run: the call.
        on_host: tensors that are in the host's memory on a GPU's machine too, as torch's foreach
            AdamW keeps its counts of updates: ops on them are not counted.
    """
    with _Counter(on_host) as counter:
        run()
    return Counts(counter.kernels, counter.waits, counter.peak)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of different memory that tensors lie in."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in tensors}
    return sum(storage.nbytes() for storage in storages.values())
