"""What this installation has, what it lacks, and how to get that."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator

import torch

import fastdistill
from fastdistill.ops._backend import extension_path, has_triton

_PACKAGES = ("torch", "triton", "diffusers", "safetensors", "numpy")


def describe_installation() -> Iterator[tuple[str, str]]:
    """(name, value) lines of ``fastdistill info``."""
    yield "fastdistill", fastdistill.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, f"missing: pip install {package}"
    yield "backend reference", "available: torch, any device"
    yield "backend cpu", _describe_cpu()
    yield "backend triton", _describe_triton()
    yield "arena", _describe_arena()
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    if not torch.cuda.is_available():
        yield "GPU", f"none that torch {torch.__version__} can use"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"compute capability {properties.major}.{properties.minor}"
        yield f"GPU {index}", f"{properties.name}, {memory:.0f} GiB, {capability}"


def _describe_cpu() -> str:
    path = extension_path()
    if path is None:
        return (
            "missing: the C++ kernels were not built; with a C++ compiler, run "
            "pip install --no-build-isolation -e . in the checkout"
        )
    return f"available: {path.name}"


def _describe_arena() -> str:
    if importlib.util.find_spec("fastdistill._arena") is None:
        return (
            "in Python: the C++ arena was not built; with a C++ compiler and pybind11, run "
            "pip install --no-build-isolation -e . in the checkout"
        )
    return "in C++"


def _describe_triton() -> str:
    if not has_triton():
        return "missing: pip install triton (Linux with a GPU)"
    if not torch.cuda.is_available():
        return "idle: Triton is installed, but torch sees no GPU"
    return "available"
