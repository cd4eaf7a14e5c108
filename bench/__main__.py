"""Print the table of all ops on this machine, and write it as JSON.

python -m bench [--output bench.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import bench_matching, bench_renoise
from bench.harness import Row, measure

SHAPES = [(64, 3, 64, 64), (8, 4, 128, 128), (256, 3, 32, 32)]
DTYPES = [torch.float32, torch.bfloat16]


def show(rows: list[Row]) -> None:
    table = Table(
        "op", "shape", "dtype", "threads", "variant", "µs", "±", "times ours", "% of copy"
    )
    for row in rows:
        table.add_row(
            *(row.op, row.shape, row.dtype, str(row.threads), row.variant),
            *(f"{row.microseconds:,.0f}", f"{row.spread:.0%}", f"{row.ratio:.2f}"),
            f"{100 * row.bandwidth:.0f}",
            end_section=row.variant.startswith("torch.compile, torch")
            or (row.op != "renoise" and row.variant == "torch.compile"),
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    output = parser.parse_args().output
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        for module in (bench_matching, bench_renoise):
            for shape in SHAPES:
                for dtype in DTYPES:
                    rows += measure(module.make_case(shape, dtype), threads)
    show(rows)
    machine = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    output.write_text(json.dumps(machine, indent=1) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
