"""Build the C++ kernels where torch and a compiler are found; install without them otherwise."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest that is supported
FLAGS = [
    *("-O3", "-g0", "-std=c++17", "-Wall", "-fvisibility=hidden"),
    "-Wno-psabi",  # vector types stay inside one file, so their calling convention is nobody's
    # The same bits from every instruction set; vector code for loops with sqrt and comparisons.
    *("-ffp-contract=off", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
]


def without_kernels(reason: str) -> None:
    """Say once why the C++ kernels are missing; pip runs this file for the metadata too."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(f"fastdistill: installing without the C++ kernels: {reason}", file=sys.stderr)


def extension() -> dict[str, Any]:
    """Arguments of `setup` that build ``fastdistill._C``, or none where that cannot be done."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "g++")):
        without_kernels("no C++ compiler was found")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        without_kernels("torch is not importable here; use `pip install --no-build-isolation`")
        return {}

    class BuildKernels(BuildExtension):
        """A failing compiler is no reason not to install: the reference backend needs none."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                without_kernels(f"the build failed ({error})")
                self.extensions: list[Any] = []

    sources = sorted(Path("csrc").rglob("*.cpp"))
    headers = sorted([*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.inl")])
    # The kernels have no Python module of their own: torch.ops.load_library reads the file.
    module = CppExtension(
        "fastdistill._C",
        [str(path) for path in sources],
        depends=[str(path) for path in headers],
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=FLAGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
