"""`Counting`: operators that a program launches, and how much memory its tensors take at most."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counting(TorchDispatchMode):
    """Counts what passes torch's dispatcher; views launch nothing and are left out.

    Attributes:
        operators: how often each was called; a foreach operator once.
        live: bytes of the storages that were made inside and are still there.
        peak: most of them at one moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def launches(self) -> int:
        """Calls of all operators."""
        return self.operators.total()

    def restart(self) -> None:
        """Count operators anew, and the peak from what is there now."""
        self.operators.clear()
        self.peak = self.live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self._seen.update(_storages((args, kwargs)))  # what was there before is not counted
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function not in _FREE:
            self.operators[function.overloadpacket.__name__] += 1
        for storage in _storages(result):
            if storage not in self._seen:
                self._watch(storage)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


_FREE = {torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default}
"""Operators that launch nothing."""


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
