"""Catches what makes the host wait for a device, on a machine that has none.

with no_synchronisation():
    optimizer.step()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _NoSynchronisation(TorchFunctionMode):
    """Raises where Python reads a tensor's value, which makes the host wait for a GPU."""

    names: ClassVar[set[str]] = {
        *("item", "tolist", "cpu", "numpy", "nonzero", "equal", "is_nonzero", "unique"),
        *("__bool__", "__float__", "__int__", "__index__", "masked_select", "allclose"),
        *("_local_scalar_dense", "__contains__", "bincount"),
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.names:
            raise AssertionError(f"host synchronisation: {function.__name__}")
        return function(*args, **(kwargs or {}))


class _NoScalarRead(TorchDispatchMode):
    """Raises where C++ reads a value on somebody's behalf, as boolean indexing does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"):
            raise AssertionError(f"host synchronisation: {name}")
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        if any(value is not None and value.dtype == torch.bool for value in indices):
            raise AssertionError("host synchronisation: boolean index")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise AssertionError where a value is read in this context."""
    with _NoSynchronisation(), _NoScalarRead():
        yield
