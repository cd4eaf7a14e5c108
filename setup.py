"""Build the C++ kernels where torch and a compiler are found; install without them otherwise."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest that is supported


def extension() -> dict[str, Any]:
    """Arguments of `setup` that build ``fastdistill._C``, or none where that cannot be done."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        reason = "torch is not importable in this build; use `pip install --no-build-isolation`"
    else:
        if compiler is not None:
            sources = sorted(str(path) for path in Path("csrc").glob("**/*.cpp"))
            # The kernels have no Python module of their own: torch.ops.load_library reads the file.
            module = CppExtension(
                "fastdistill._C",
                sources,
                include_dirs=[str(Path("csrc").resolve())],
                define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("Py_LIMITED_API", "0x030a0000")],
                extra_compile_args=["-O3", "-g0", "-std=c++17", "-Wall", "-fvisibility=hidden"],
                py_limited_api=True,
            )
            return {
                "ext_modules": [module],
                "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)},
                "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
            }
        reason = "no C++ compiler was found"
    print(f"fastdistill: installing without the C++ kernels: {reason}", file=sys.stderr)
    return {}


setup(**extension())
