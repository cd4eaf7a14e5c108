"""Compile what the launchers launch, for GPUs that are not here, and read the machine code.

    python tests/kernels/certificate.py             # table of every case, exit status 1 on a fault
    python tests/kernels/certificate.py --json F    # the same, and rows with their faults in F

Launchers run on meta tensors while `JITFunction.run` only compiles and a stub stands for the
driver, so that signatures, alignment hints, constants and warps are those of the running system by
construction. A process without TRITON_INTERPRET is needed; `main` sees to it.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
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

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
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
REGISTERS = 128  # at 512 threads, the largest program, the register file of an SM


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


def _cases() -> Iterator[Case]:
    """All shapes and all dtypes on sm_90, all kernels on all targets."""
    ops = ("normal", "renoise", "denoising", "matching")
    for op in ops:
        for shape in SHAPES:
            yield Case(op, "sm_90", shape, "bfloat16")
        for shape in ("EDM-CIFAR", "DiT-512", "SDXL"):
            yield Case(op, "sm_90", shape, "float32")
        for shape in ("DiT-512", "SDXL"):
            yield Case(op, "sm_90", shape, "float16")
            if op != "normal":
                yield Case(op, "sm_90", shape, "float32", raw="bfloat16")
    for target in TARGETS:
        yield Case("density_ratio", target)
        yield Case("uniform", target, "DiT-256", "bfloat16")
        yield Case("matching_esd", target, "DiT-512", "float32", raw="bfloat16")
        yield Case("matching_plain", target, "SDXL", "bfloat16")
        if target != "sm_90":
            for op in ops:
                yield Case(op, target, "EDM-CIFAR", "bfloat16")
                yield Case(op, target, "DiT-512", "float32")
                yield Case(op, target, "SDXL", "bfloat16")
            yield Case("matching", target, "DiT-512", "float32", raw="bfloat16")
    yield Case("density_ratio_large", "sm_90")


CASES = list(_cases())
# What must be refused, and a word of the fault that must be found.
BAD_CASES = {
    Case("bad_runtime_length", "sm_90", "DiT-256", "bfloat16"): "loads",
    Case("bad_runtime_length", "gfx942", "DiT-256", "bfloat16"): "loads",
    Case("bad_one_program", "sm_90", "SDXL", "bfloat16"): "spills",
    Case("bad_one_program", "gfx942", "SDXL", "bfloat16"): "spills",
    Case("bad_second_read", "sm_90", "DiT-256", "float32"): "loads",
    Case("bad_float64", "sm_90", "DiT-256", "float32"): "float64",
    Case("bad_offset", "sm_90", "DiT-256", "float32"): "32-bit offset",
}


def _launch(case: Case, made: list[torch.Tensor]) -> None:
    """Call the launcher of ``case`` on meta tensors, noting in ``made`` those that it is given."""
    from fastdistill.kernels import denoising, density_ratio, matching, noise, renoise

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

    def match_scores(**options: Any) -> None:
        uncond, critic_uncond = options.get("uncond"), options.get("critic_uncond")
        matching.matching_cotangent(
            x(), x(), raw(), number(), number(), raw(), number(), number(), uncond, 3.0,
            critic_uncond, 0.5, number(), options.get("normalise", True), 1.0, dtype,
        )  # fmt: skip

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
        found = re.findall(rf"\b{operation}((?:\.\w+)*)", sass)
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
            rf"\b(?:global|buffer|flat)_{operation}_([a-z]+?)(?:x(\d))?(?:_\w+)?\b", assembly
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
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "float64": len(re.findall(r"\bv_(?:add|mul|fma)_f64", assembly)),
        "loads": accesses("load"),
        "stores": accesses("store"),
    }


def _expected(bound: dict[str, Any], given: list[torch.Tensor], threads: int) -> dict[str, Any]:
    """Bytes that one program must load and store by width: each sample-sized tensor once.

    Beside them come numbers: a load for each small tensor, two more for the three words of a key,
    and up to four statistics.
    """
    block, parts = bound["BLOCK"], bound["PARTS"]
    lanes = bound["N"] if parts == 1 else block
    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    numbers = 2
    for name, value in bound.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.ndim > 2 and value.numel() >= BATCH * bound["N"]:
            side = loads if any(value is tensor for tensor in given) else stores
            vector = 16 * threads
            side[16] += vector * math.ceil(lanes * value.element_size() / vector)
            continue
        numbers += 1
        if name == "residual_ptr" and "cotangent_ptr" in bound:
            vector = min(16, 4096 // threads)  # the partial sums, in one block of 1,024
            loads[vector] += 4096
            numbers += vector < 16
    return {
        "loads": dict(loads),
        "stores": dict(stores),
        "numbers": {"loads": numbers, "stores": 4},
    }


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
        row |= (_read_nvidia if nvidia else _read_amd)(code, threads)
        row["narrow_offsets"] = _narrow_offsets(compiled.asm["ttir"])
        row["expected"] = _expected(bound, given, threads) if "PARTS" in bound else None
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
    if row["registers"] > REGISTERS:
        found.append(f"registers: {row['registers']}")
    if row["narrow_offsets"]:
        found.append(f"32-bit offset of a sample: {row['narrow_offsets']}")
    if row["expected"] is None:
        return found
    for side in ("loads", "stores"):
        expected = row["expected"][side]
        found_bytes = {width: size for width, size in row[side].items() if width >= 16}
        wanted_bytes = {width: size for width, size in expected.items() if width >= 16}
        if found_bytes != wanted_bytes:
            found.append(f"{side}: {found_bytes} bytes by width, expected {wanted_bytes}")
        narrow = sum(size // width for width, size in row[side].items() if width < 16)
        narrow //= row["threads"]
        if narrow > row["expected"]["numbers"][side]:
            found.append(f"{side}: {narrow} accesses a thread are narrower than 128 bits")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text; bytes are those of one program."""
    head = ["case", "kernel", "threads", "registers", "stack", "shared", "loads", "stores"]
    lines = [head]
    for row in rows:
        sizes = [" ".join(f"{w}B:{n}" for w, n in row[side].items()) for side in head[6:]]
        lines.append([str(row[name]) for name in head[:6]] + sizes)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text += [f"FAULT {row['case']} {row['kernel']}: {'; '.join(row['faults'])}"
             for row in rows if row["faults"]]  # fmt: skip
    return "\n".join(text)


def main() -> int:
    """Certify every case in two processes, print the table, and return 1 on a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write rows here, those of bad cases too")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))  # the workers inherit it
    bad = list(BAD_CASES) if options.json else []
    chosen = [case for case in bad + CASES if options.match in str(case)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        rows = [row for rows in pool.map(certify, chosen, chunksize=1) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(rows))
    good = {str(case) for case in CASES}
    rows = [row for row in rows if row["case"] in good]
    print(table(rows))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
