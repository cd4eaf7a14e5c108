"""Which implementation of an op runs: the choice, its override, and the extension's loading."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import pathlib
import warnings
from collections.abc import Iterator
from typing import Literal, get_args

import torch

Backend = Literal["reference", "cpu", "triton"]

_forced: Backend | None = None


def extension_path() -> pathlib.Path | None:
    """Path of the compiled C++ extension, or None where the package was installed without it."""
    folder = pathlib.Path(__file__).resolve().parent.parent
    return next(iter(sorted(folder.glob("_C*.so"))), None)


@functools.cache
def load_extension() -> bool:
    """Load the C++ kernels once. False, with one warning that says how to get them, without."""
    path = extension_path()
    if path is None:
        reason = "it was not built"
    else:
        try:
            torch.ops.load_library(path)
            return True
        except OSError as error:
            reason = str(error)
    warnings.warn(
        f"fastdistill's C++ kernels are unavailable ({reason}); CPU tensors use the reference "
        "backend, which is slower. With a C++ compiler, run "
        "`pip install --no-build-isolation -e .` in the checkout to build them.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported (it is not imported here)."""
    return importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Force every op inside the block onto one backend, for debugging and for tests.

    Args:
        backend: ``"reference"`` (torch, any device, float64 too), ``"cpu"`` (C++; the layers' ops,
            which have none, run their reference) or ``"triton"``.

    Raises:
        ValueError: for another name, or for ``"cpu"`` where the extension is not built.
    """
    global _forced
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(get_args(Backend))}")
    if backend == "cpu" and not load_extension():
        raise ValueError("backend 'cpu' needs the C++ extension, which is not built here")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def choose_backend(tensor: torch.Tensor) -> Backend:
    """Backend for ops on ``tensor``: the forced one, else Triton on CUDA and ROCm, C++ on the CPU.

    Other devices use the reference. float64 on CUDA is refused by Triton's launchers rather than
    computed elsewhere in silence.
    """
    if _forced is not None:
        return _forced
    if tensor.device.type == "cuda":
        return "triton"
    if tensor.device.type == "cpu" and load_extension():
        return "cpu"
    return "reference"
