"""Build the C++ extensions where a compiler is found; install without them otherwise."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest that is supported
FLAGS = [
    *("-O3", "-g0", "-std=c++17", "-Wall", "-fvisibility=hidden"),
    "-Wno-psabi",  # vector types stay inside one file, so their calling convention is nobody's
    # The same bits from every instruction set; vector code for loops with sqrt and comparisons.
    *("-ffp-contract=off", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),
]


def without(what: str, reason: object) -> None:
    """Say why a part is missing, once: pip runs this file for the metadata too."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(f"fastdistill: installing without {what}: {reason}", file=sys.stderr)


def build_command(base: type[build_ext]) -> type[build_ext]:
    """`base`, but a failing compiler is no reason not to install: Python and torch do the same."""

    class Build(base):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                without("C++", f"the compiler cannot be used ({error})")
                self.extensions: list[Extension] = []

        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                without(extension.name, f"the build failed ({error})")
                self.extensions = [other for other in self.extensions if other is not extension]

    return Build


def files(folder: str) -> dict[str, Any]:
    """Sources below `folder`, and the headers that make them be built again."""
    path = Path("csrc") / folder
    headers = sorted([*path.rglob("*.h"), *path.rglob("*.inl")])
    return {
        "sources": [str(source) for source in sorted(path.rglob("*.cpp"))],
        "depends": [str(header) for header in headers],
    }


def kernels() -> tuple[list[Extension], type[build_ext]]:
    """``fastdistill._C``, if there is a torch to build it against, and the command that does."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        reason = "torch is not importable here; use `pip install --no-build-isolation`"
        without("the C++ kernels", reason)
        return [], build_ext
    # The kernels have no Python module of their own: torch.ops.load_library reads the file.
    module = CppExtension(
        "fastdistill._C",
        **files("cpu"),
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=FLAGS,
        py_limited_api=True,
    )
    return [module], BuildExtension


def arena() -> list[Extension]:
    """``fastdistill._arena``, which needs no torch."""
    try:
        import pybind11
    except ImportError:
        without("the C++ arena", "pybind11 is not importable here; `pip install pybind11`")
        return []
    module = Extension(
        "fastdistill._arena",
        **files("arena"),
        include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
        extra_compile_args=[*FLAGS, "-pthread"],
        extra_link_args=["-pthread"],
        language="c++",
    )
    return [module]


def extensions() -> dict[str, Any]:
    """Arguments of `setup` that build what can be built here."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "g++")):
        without("C++", "no C++ compiler was found")
        return {}
    modules, base = kernels()
    return {
        "ext_modules": [*modules, *arena()],
        "cmdclass": {"build_ext": build_command(base)},
    }


setup(**extensions())
