"""Compile what the launchers launch, for GPUs that are not here, and read the machine code.

    python tests/kernels/certificate.py             # every case, into docs/results/certificates.csv
    python tests/kernels/certificate.py --json F    # the suite's cases and the bad ones, rows in F

The exit status is 1 where a kernel has a fault.

Launchers run on meta tensors while `JITFunction.run` only compiles and a stub stands for the
driver, so that signatures, alignment hints, constants and warps are those of the running system by
construction. A process without TRITON_INTERPRET is needed; `main` sees to it.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import token_cases
import torch
import unet_cases

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORED = ROOT / "docs/results/certificates.csv"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# PixArt's latents are those of DiT-512 at 512 pixels and those of SDXL at 1,024.
SHAPES = {
    "EDM-CIFAR": (3, 32, 32),
    "ImageNet-64": (3, 64, 64),
    "DiT-256": (4, 32, 32),
    "DiT-512": (4, 64, 64),
    "SDXL": (4, 128, 128),
    "SD3": (16, 128, 128),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCH = 8
REGISTER_FILE = {"cuda": 65_536, "hip": 131_072}  # of the SM or CU that holds a program
LOOP_NUMBERS = 12  # coefficients and partial sums of a kernel with a loop
CODES = "8-bit moments come 8 bytes a thread, whose 8 neighbours are 128 bits of 16-bit numbers"
# Kernels or cases whose narrow accesses to something large are meant, and why.
NARROW = {
    "adamw_codes": CODES,
    "adamw_codes_stochastic_ranges": CODES,
    "_coefficients_kernel": "partial products: a warp reads 256 contiguous bytes, 8 a thread",
    "_project_kernel": "numbers of the samples, and of the mean that all samples of a tile share",
    "_map_kernel": "numbers of the samples, and of the mean that all samples of a tile share",
    "_along_components_kernel": "x and the result, 1/K of what is read: 128 elements a program",
    **unet_cases.NARROW,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a launcher. ``raw`` is the dtype of network outputs where it is another."""

    op: str
    target: str
    shape: str = "-"
    dtype: str = "float32"
    raw: str | None = None

    def __str__(self) -> str:
        dtype = self.dtype if self.raw is None else f"{self.dtype}+{self.raw}"
        return f"{self.op}-{self.target}-{self.shape}-{dtype}"


DTYPE_PAIRS = (
    ("bfloat16", None),
    ("float32", None),
    ("float16", None),
    ("float32", "bfloat16"),
)
SAMPLE_OPS = ("renoise", "denoising", "matching", "projection", "consistency")
VARIANTS = (
    "matching_esd",
    "matching_plain",
    "projection_l1",
    "projection_power",
    "projection_plain",
    "consistency_l1",
    "consistency_finished",
)
BASES = ("3072x128", "12288x256", "65536x64")
UPDATES = (
    "adamw",
    "adamw_plain",
    "adamw_averages",
    "adamw_stochastic",
    "adamw_ranges",
    "adamw_codes",
    "adamw_codes_stochastic_ranges",
)


def _all_cases() -> Iterator[Case]:
    """Every kernel in every dtype, at the sizes of every model, on every target."""
    for target in TARGETS:
        for shape in SHAPES:
            for op in SAMPLE_OPS:
                yield from (Case(op, target, shape, *pair) for pair in DTYPE_PAIRS)
            yield from (Case("normal", target, shape, dtype) for dtype in DTYPES)
            for op in ("mixture_diagonal", "mixture_isotropic"):
                yield from (Case(op, target, shape, dtype) for dtype in DTYPES)
        for op in VARIANTS:
            yield Case(op, target, "DiT-512", "float32", "bfloat16")
            yield Case(op, target, "SDXL", "bfloat16")
        for dtype in DTYPES:
            yield Case("uniform", target, "DiT-256", dtype)
            yield Case("norm", target, "-", dtype)
            yield from (Case(op, target, "-", dtype) for op in UPDATES)
            yield from (Case("gaussian", target, size, dtype) for size in BASES)
        yield Case("gaussian", target, "12288x256", "float32", "bfloat16")
        yield Case("density_ratio", target)
        yield Case("density_ratio_large", target)
        for op, shape in token_cases.names():
            yield from (Case(op, target, shape, dtype) for dtype in DTYPES)
        for op, shapes in unet_cases.SHAPES.items():
            for shape in shapes:
                yield from (Case(op, target, shape, dtype) for dtype in DTYPES)


def _of_the_suite(case: Case) -> bool:
    """All kernels on all targets, and each way to cut a sample and each dtype on sm_90."""
    if case.op in ("density_ratio", "uniform", *VARIANTS) or case.shape == "-":
        return case.target == "sm_90" or case.dtype == "bfloat16" or case.op == "density_ratio"
    if case.op in token_cases.OPS:
        first = case.shape == next(iter(token_cases.shapes(case.op)))
        return case.dtype == "bfloat16" and (first or case.target == "sm_90")
    if case.op in unet_cases.SHAPES:
        middle = case.shape == unet_cases.SHAPES[case.op][1]
        return middle and (case.target == "sm_90" or case.dtype == "bfloat16")
    if case.op == "gaussian":
        return case.shape == "12288x256" and (case.target == "sm_90" or case.dtype == "bfloat16")
    if case.target != "sm_90":
        return (case.shape, case.dtype, case.raw) == ("SDXL", "bfloat16", None)
    return case.shape in ("DiT-512", "SDXL") or (case.shape, case.dtype) == (
        "EDM-CIFAR",
        "bfloat16",
    )


ALL_CASES = list(_all_cases())
CASES = [case for case in ALL_CASES if _of_the_suite(case)]
# What must be refused, and a word of the fault that must be found.
BAD_CASES = {
    Case("bad_runtime_length", "sm_90", "DiT-256", "bfloat16"): "loads",
    Case("bad_runtime_length", "gfx942", "DiT-256", "bfloat16"): "loads",
    Case("bad_one_program", "sm_90", "SDXL", "bfloat16"): "spills",
    Case("bad_one_program", "gfx942", "SDXL", "bfloat16"): "spills",
    Case("bad_second_read", "sm_90", "DiT-256", "float32"): "loads",
    Case("bad_float64", "sm_90", "DiT-256", "float32"): "float64",
    Case("bad_offset", "sm_90", "DiT-256", "float32"): "32-bit offset",
    Case("bad_update", "sm_90", "DiT-256", "float32"): "loads",
    Case("bad_update", "gfx942", "DiT-256", "float32"): "loads",
}


def _launch(case: Case, made: list[torch.Tensor]) -> None:
    """Call the launcher of ``case`` on meta tensors, noting in ``made`` those that it is given."""
    from fastdistill.kernels import (
        adamw,
        consistency,
        denoising,
        density_ratio,
        gaussian,
        matching,
        mixture,
        noise,
        norm,
        projection,
        renoise,
    )

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made.append(torch.empty(shape, dtype=dtype, device="meta"))
        return made[-1]

    def number() -> torch.Tensor:
        return meta(BATCH)

    def x() -> torch.Tensor:
        return meta(BATCH, *shape, dtype=dtype)

    def raw() -> torch.Tensor:
        return meta(BATCH, *shape, dtype=raw_dtype)

    shape, dtype = SHAPES.get(case.shape, ()), DTYPES[case.dtype]
    raw_dtype = DTYPES[case.raw or case.dtype]
    key, sample = meta(3, dtype=torch.int64), meta(BATCH, dtype=torch.int64)

    def networks() -> tuple[torch.Tensor, ...]:
        return x(), x(), raw(), number(), number(), raw(), number(), number()

    def match_scores(**options: Any) -> None:
        uncond, critic_uncond = options.get("uncond"), options.get("critic_uncond")
        normalise = options.get("normalise", True)
        rest = (uncond, 3.0, critic_uncond, 0.5, number(), normalise, 1.0, dtype)
        matching.matching_cotangent(*networks(), *rest)

    def project(exponent: float, offset: float, elementwise: bool, guided: bool = True) -> None:
        rest = (raw() if guided else None, 3.0, number(), number(), exponent, offset, elementwise)
        projection.projection_cotangents(*networks(), *rest, 1.2, True, 1.0)

    def be_consistent(exponent: float, elementwise: bool, earlier: bool = True) -> None:
        target = (raw(), x(), number(), number()) if earlier else (x(), None, None, None)
        online = (raw(), x(), number(), number())
        consistency.consistency_cotangent(
            *online, *target, number(), exponent, 0.0, elementwise, 1.0
        )

    def mix(components: int, isotropic: bool) -> None:
        elements = math.prod(shape)
        means = meta(components, elements, dtype=dtype)
        spread = meta(components, 1 if isotropic else elements, dtype=dtype)
        given = (x(), number(), number(), means, spread)
        mixture.mixture_denoise(*given, meta(components))
        mixture.mixture_denoise_backward(*given, meta(BATCH, components), x(), number())

    def update(
        averages: int = 1, copy: bool = True, seeded: bool = False, ranges: int = 1,
        coded: bool = False,
    ) -> None:  # fmt: skip
        length = 2**24
        state = [meta(length) for _ in range(1 + averages)]
        moments = [meta(length, dtype=torch.uint8 if coded else torch.float32) for _ in range(2)]
        scales = [meta(length // 256) if coded else None for _ in range(2)]
        lower = meta(length, dtype=torch.bfloat16) if copy else None
        adamw.adamw_ema_(
            *(state[0], meta(length, dtype=dtype), *moments, meta(), state[1:], lower, *scales),
            *(meta(2, dtype=torch.int32), meta(), meta(), meta(), key if seeded else None),
            *(key if coded else None, [1000 * k for k in range(ranges)]),
            *([k % 3 for k in range(ranges)], [1e-3] * 3, [0.1] * 3, 0.9, 0.999, 1e-8, 1.0),
            *([0.9] * averages, True),
        )

    match case.op:
        case "normal" | "uniform":
            getattr(noise, case.op)(key, sample, shape, dtype)
        case "renoise":
            renoise.renoise(x(), number(), number(), key, sample, number(), raw_dtype)
        case "denoising":
            denoising.denoising_cotangent(raw(), x(), x(), number(), number(), number(), 0.5)
        case "matching":
            match_scores(uncond=raw())
        case "matching_esd":
            match_scores(uncond=raw(), critic_uncond=raw())
        case "matching_plain":
            match_scores(normalise=False)
        case "projection":
            project(1.0, 0.1, False)
        case "projection_l1":
            project(1.0, 0.0, True)
        case "projection_power":
            project(1.5, 0.0, False)
        case "projection_plain":
            project(2.0, 0.0, False, guided=False)
        case "consistency":
            be_consistent(1.0, False)
        case "consistency_l1":
            be_consistent(1.0, True)
        case "consistency_finished":
            be_consistent(1.5, False, earlier=False)
        case "mixture_diagonal":
            mix(64, isotropic=False)
        case "mixture_isotropic":
            mix(2000, isotropic=True)
        case "gaussian":
            elements, directions = map(int, case.shape.split("x"))
            one, other = [(meta(64), meta(64), meta(64, directions)) for _ in range(2)]
            flat = (meta(64, elements, dtype=dtype), meta(elements))
            basis = meta(elements, directions, dtype=raw_dtype)
            gaussian.gaussian_transport(*flat, basis, meta(64), *one, *other)
        case "norm":
            norm.sum_of_squares(meta(2**24 + 5, dtype=dtype), meta(1, dtype=torch.int32))
        case "adamw":
            update()
        case "adamw_plain":
            update(averages=0, copy=False)
        case "adamw_averages":
            update(averages=3)
        case "adamw_stochastic":
            update(seeded=True)
        case "adamw_ranges":
            update(ranges=200)
        case "adamw_codes":
            update(coded=True)
        case "adamw_codes_stochastic_ranges":
            update(coded=True, seeded=True, ranges=200)
        case "density_ratio" | "density_ratio_large":
            batch, bins, power = (256, 10, 1.0) if case.op == "density_ratio" else (8000, 1000, 0.3)
            density_ratio.density_ratio_weight(
                meta(batch, 3), meta(batch, dtype=torch.int64), meta(bins, 2),
                power, 1.0, 1.0, -1.0, 0.9, 1.0, 10.0, 0.1, 20.0,
            )  # fmt: skip
        case "bad_one_program":
            whole = matching.cut(math.prod(shape), 2**30)
            options = {**whole.options, "num_warps": 16}
            before, matching.cut = matching.cut, lambda *_: whole._replace(options=options)
            try:
                match_scores()
            finally:
                matching.cut = before
        case op if op in token_cases.OPS:
            token_cases.launch(op, case.shape, BATCH, dtype, meta)
        case op if op in unet_cases.SHAPES:
            unet_cases.launch(op, case.shape, BATCH, dtype, meta)
        case bad:
            import bad_kernels

            bad_kernels.launch(bad, x(), number())


class _Driver:
    """As much of a Triton driver as compiling needs: a target, under a device number of its own."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        cuda = target.startswith("sm_")
        self.target = (
            GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
        )
        self.device = TARGETS.index(target)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compile_only(target: str) -> Iterator[list[tuple[str, dict[str, Any], Any]]]:
    """Let launches compile for ``target``; yields (kernel, arguments by name, compiled kernel)."""
    import triton
    from triton.runtime.jit import JITFunction

    launched: list[tuple[str, dict[str, Any], Any]] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        bound = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launched.append((self.__name__, bound, compiled))
        return compiled

    triton.runtime.driver.set_active(_Driver(target))
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run


def _bytes_by_width(accesses: list[int], threads: int) -> dict[int, int]:
    counts = collections.Counter(accesses)
    return {width: width * count * threads for width, count in sorted(counts.items())}


def _read_nvidia(cubin: bytes, threads: int) -> dict[str, Any]:
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            arguments = [str(tools / command[0]), *command[1:], file.name]
            return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

        usage, sass = run("cuobjdump", "--dump-resource-usage"), run("nvdisasm", "-c")
    resources = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}

    def accesses(operation: str) -> dict[int, int]:
        # LDGSTS, a load into shared memory, is a load too.
        found = re.findall(rf"\b{operation}(?:STS)?((?:\.\w+)*)", sass)
        sizes = {"64": 8, "128": 16, "256": 32, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        widths = [
            next((sizes[part] for part in name.split(".") if part in sizes), 4) for name in found
        ]
        return _bytes_by_width(widths, threads)

    return {
        "registers": resources["REG"],
        "stack": resources["STACK"],
        "shared": resources["SHARED"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "float64": len(re.findall(r"\bD(?:ADD|MUL|FMA)\b", sass)),
        "loads": accesses("LDG"),
        "stores": accesses("STG"),
    }


def _read_amd(assembly: str, threads: int) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    def accesses(operation: str) -> dict[int, int]:
        found = re.findall(
            rf"\b(?:global|buffer|flat)_{operation}_(?:lds_)?([a-z]+?)(?:x(\d))?(?:_\w+)?\b",
            assembly,
        )
        sizes = {
            "dword": 4,
            "ushort": 2,
            "sshort": 2,
            "short": 2,
            "ubyte": 1,
            "sbyte": 1,
            "byte": 1,
        }
        return _bytes_by_width([sizes[name] * int(count or 1) for name, count in found], threads)

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "shared": number("group_segment_fixed_size"),
        # Scalar registers spill into lanes of a vector register; in memory they would be stack.
        "spills": number("vgpr_spill_count"),
        "float64": len(re.findall(r"\bv_(?:add|mul|fma)_f64", assembly)),
        "loads": accesses("load"),
        "stores": accesses("store"),
    }


def _expected(
    bound: dict[str, Any], given: list[torch.Tensor], threads: int, folds_masks: bool
) -> dict[str, Any]:
    """Bytes that one program must load and store by width: each sample-sized tensor once.

    Beside them come numbers: a load for each small tensor, two more for the three words of a key,
    and up to four statistics.
    """
    tensors = {name: value for name, value in bound.items() if isinstance(value, torch.Tensor)}
    samples = {
        name: value
        for name, value in tensors.items()
        if (value.ndim > 2 and value.numel() >= BATCH * bound["N"]) or name in token_cases.CHANNELS
    }
    # A thread has as many neighbours as fill 128 bits of the narrowest tensor; what lies past the
    # sample is cut off by whole rows of threads where the compiler folds the mask, as for CUDA.
    row = threads * 16 // min(value.element_size() for value in samples.values())
    lanes = bound["N"] if bound["PARTS"] == 1 and folds_masks else bound["BLOCK"]
    lanes = row * math.ceil(lanes / row)
    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    for name, value in samples.items():
        side = (
            loads
            if any(value is tensor for tensor in given) or name in token_cases.CHANNELS
            else stores
        )
        side[16] += lanes * value.element_size()
    exact = bound["N"] if bound["PARTS"] == 1 else bound["BLOCK"]
    read, written = (sum(side.values()) // lanes * exact for side in (loads, stores))
    shares = sum(SHARES.get(name, 0) for name in tensors) if written else 0
    return {
        "loads": dict(loads),
        "stores": dict(stores),
        "least": {"loads": read, "stores": written},
        "shares": shares * 4096,  # each in one block of 1,024
        "numbers": {"loads": 2 + len(tensors) - len(samples) + shares, "stores": 4},
    }


# Partial sums that the second launch of a sample adds up, and how many of them there are at most.
SHARES = {"residual_ptr": 1, "norm_ptr": 1, "sums_ptr": 4}


def _expected_update(bound: dict[str, Any], threads: int) -> dict[str, Any]:
    """Bytes that one turn of `adamw_ema_` must move: each range once each way.

    8-bit moments count among the numbers, as their scales, key words and the table of ranges do.
    """
    averages, copy = bound["ema_ptrs"], bound["copy_ptr"]
    moments = [bound["exp_avg_ptr"], bound["exp_avg_sq_ptr"]]
    coded = moments[0].dtype == torch.uint8
    state = [bound["parameter_ptr"], *averages, *([] if coded else moments)]
    read, written = [*state, bound["gradient_ptr"]], [*state, *([] if copy is None else [copy])]

    def bytes_of(ranges: list[torch.Tensor]) -> int:
        return sum(_rounded(bound["BLOCK"] * value.element_size(), threads) for value in ranges)

    loads, stores = bytes_of(read), bytes_of(written)
    codes, ranges = (4 if coded else 0), (5 if bound["ranges_ptr"] is not None else 0)
    keys = sum(bound[name] is not None for name in ("key_ptr", "moment_key_ptr"))
    return {
        "loads": {16: loads},
        "stores": {16: stores},
        "least": {"loads": loads, "stores": stores},
        "shares": 16 * threads * (ranges // 2 + keys),  # rows and words, merged into wide accesses
        "numbers": {"loads": 6 + 3 * keys + codes + ranges, "stores": 3 + codes},
    }


def _rounded(size: int, threads: int) -> int:
    """Bytes of whole 128-bit accesses of all threads."""
    vector = 16 * threads
    return vector * math.ceil(size / vector)


def _tile(bound: dict[str, Any]) -> int:
    """Bytes of basis and samples, means and variances, or of a range, that a loop takes at once."""
    if token_cases.is_one(bound):
        return token_cases.tile(bound)
    if "basis_ptr" in bound:
        basis = bound["DIRECTIONS"] * bound["basis_ptr"].element_size()
        return bound["ELEMENTS"] * (basis + bound["SAMPLES"] * bound["x_ptr"].element_size())
    if "means_ptr" in bound:
        elements = bound["ROWS"] * bound["COLUMNS"]
        return elements * bound["means_ptr"].element_size() * (1 if bound["ISOTROPIC"] else 2)
    if "value_ptr" in bound:
        return bound["BLOCK"] * bound["value_ptr"].element_size()
    return 0


def _large(bound: dict[str, Any]) -> bool:
    """Whether a kernel touches anything as large as a batch of samples, means or a basis."""
    sizes = [value.numel() for value in bound.values() if isinstance(value, torch.Tensor)]
    return max(sizes) >= 2**16


def _narrow_offsets(ttir: str) -> int:
    """Scalar pointer offsets that are computed in 32 bits, so that they wrap past 2^31 elements."""
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    offsets = re.findall(r"tt\.addptr %\w+, (%\w+) : !tt\.ptr<\w+>, i32", ttir)
    return sum(offset not in constants for offset in offsets)


def certify(case: Case) -> list[dict[str, Any]]:
    """Compile ``case``; one row a launch, with the list of its faults."""
    given: list[torch.Tensor] = []
    with _compile_only(case.target) as launched:
        _launch(case, given)
    rows = []
    for kernel, bound, compiled in launched:
        nvidia = "cubin" in compiled.asm
        threads = compiled.metadata.num_warps * (32 if nvidia else 64)
        code = compiled.asm["cubin" if nvidia else "amdgcn"]
        row = {"case": str(case), "kernel": kernel, "threads": threads}
        row["backend"] = "cuda" if nvidia else "hip"
        row |= (_read_nvidia if nvidia else _read_amd)(code, threads)
        row["narrow_offsets"] = _narrow_offsets(compiled.asm["ttir"])
        row["large"], row["tile"] = _large(bound), _tile(bound)
        row["expected"] = None
        if kernel == "_adamw_kernel":
            row["expected"] = _expected_update(bound, threads)
        elif kernel in unet_cases.LOADS:
            row["expected"] = unet_cases.expected(kernel, bound, threads)
        elif "PARTS" in bound and "N" in bound:
            row["expected"] = _expected(bound, given, threads, nvidia)
        row["faults"] = faults(row)
        rows.append(row)
    return rows


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel; empty where it keeps every promise."""
    found = []
    if row["stack"] or row["spills"]:
        found.append(f"spills: {row['stack']} bytes of stack, {row['spills']} spills")
    if row["float64"]:
        found.append(f"float64: {row['float64']} instructions")
    if row["registers"] * row["threads"] > REGISTER_FILE[row["backend"]]:
        found.append(f"registers: {row['registers']}")
    if row["expected"] is None:
        return found + (_loop_faults(row) if row["large"] else [])
    if row["narrow_offsets"]:
        found.append(f"32-bit offset of a sample: {row['narrow_offsets']}")
    for side in ("loads", "stores"):
        wanted = row["expected"][side].get(16, 0)
        wide = sum(size for width, size in row[side].items() if width >= 16)
        # Numbers may be merged into one wide access, and each tensor may be cut off at the sample's
        # end by whole rows of threads or more finely, down to its own bytes.
        most = wanted + 16 * row["threads"] + (row["expected"]["shares"] if side == "loads" else 0)
        least = row["expected"]["least"][side]
        if side == "loads" and row["kernel"] == "_projection_kernel" and "_l1-" in row["case"]:
            least = least * 4 // 5  # given the sums, L1 needs no R and so no x0
        if not least <= wide <= most:
            found.append(f"{side}: {wide} bytes in 128-bit accesses, expected {wanted}")
    return found + _narrow_faults(row, row["expected"]["numbers"])


def _loop_faults(row: dict[str, Any]) -> list[str]:
    """A loop's tiles must come in 128-bit accesses; how often it turns is not known here."""
    wide = sum(size for width, size in row["loads"].items() if width >= 16)
    if wide < row["tile"]:
        return [f"loads: {wide} bytes in 128-bit accesses, expected at least {row['tile']}"]
    if _reason(row):
        return []
    return _narrow_faults(row, dict.fromkeys(("loads", "stores"), LOOP_NUMBERS))


def _reason(row: dict[str, Any]) -> str | None:
    """Why narrow accesses are meant, where they are."""
    return NARROW.get(row["kernel"]) or NARROW.get(row["case"].split("-")[0])


def _narrow_faults(row: dict[str, Any], allowed: dict[str, int]) -> list[str]:
    """Accesses below 128 bits, more of them than there are numbers to read or write."""
    found = []
    for side in ("loads", "stores"):
        narrow = sum(size // width for width, size in row[side].items() if width < 16)
        narrow //= row["threads"]
        if narrow > allowed[side]:
            found.append(f"{side}: {narrow} accesses a thread are narrower than 128 bits")
    return found


COLUMNS = ("op", "kernel", "shape", "dtype", "target", "threads", "registers", "shared", "loads",
           "stores", "note")  # fmt: skip


def stored_line(case: Case, row: dict[str, Any]) -> dict[str, str]:
    """A row as the stored table shows it; bytes are those of one program, or of one turn."""
    dtype = case.dtype if case.raw is None else f"{case.dtype}+{case.raw}"
    sizes = {
        side: " ".join(f"{int(width) * 8}b:{size}" for width, size in row[side].items())
        for side in ("loads", "stores")
    }
    notes = [*row["faults"], *([reason] if (reason := _reason(row)) else [])]
    numbers = {name: str(row[name]) for name in ("kernel", "threads", "registers", "shared")}
    line = {"op": case.op, "shape": case.shape, "dtype": dtype, "target": case.target}
    line = line | numbers | sizes | {"note": "; ".join(notes)}
    return {name: line[name] for name in COLUMNS}


def write(lines: list[dict[str, str]]) -> None:
    """Store the table, with the versions that made it in the first column of its last line."""
    import triton

    with STORED.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        writer.writerow({"op": f"Triton {triton.__version__}"})


def main() -> int:
    """Certify every case in two processes, and return 1 on a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="the suite's cases and the bad ones")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))  # the workers inherit it
    chosen = [*BAD_CASES, *CASES] if options.json else ALL_CASES
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        rows = list(zip(chosen, pool.map(certify, chosen, chunksize=4), strict=True))
    if options.json:
        options.json.write_text(json.dumps([row for _, found in rows for row in found]))
    else:
        write([stored_line(case, row) for case, found in rows for row in found])
    faulty = [
        row for case, found in rows if case not in BAD_CASES for row in found if row["faults"]
    ]
    for row in faulty:
        print(f"{row['case']} {row['kernel']}: {'; '.join(row['faults'])}")
    print(
        f"{len(chosen)} cases, {sum(len(found) for _, found in rows)} kernels, {len(faulty)} faults"
    )
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
