"""The machine code of every kernel on GPUs that are not here: no spills, every byte moved once.

`certificate.py` compiles in processes of its own, since this one interprets. For sm_80, sm_90,
sm_100 and gfx942 it proves: no stack and no spills; accesses of 128 bits to everything that is as
large as a sample, a basis or a range of parameters; no float64 arithmetic; and of kernels without a
loop, which are most, int64 offsets and that a program loads and stores exactly the bytes that its
formula needs. Its whole table lies in docs/results; the part compiled here must be what it says.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import certificate
import pytest
import triton

pytestmark = [pytest.mark.ahead_of_time, pytest.mark.slow]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Rows of the certificate by case."""
    folder = tmp_path_factory.mktemp("certificate")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    script = pathlib.Path(certificate.__file__)
    result = subprocess.run(
        [sys.executable, script, "--json", folder / "rows.json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert (folder / "rows.json").exists(), result.stderr
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((folder / "rows.json").read_text()):
        by_case.setdefault(row["case"], []).append(row)
    return by_case


@pytest.mark.parametrize("case", certificate.CASES, ids=str)
def test_kernel_is_certified(rows: dict[str, list[dict[str, Any]]], case: certificate.Case) -> None:
    assert rows[str(case)]
    assert [row["faults"] for row in rows[str(case)] if row["faults"]] == []


def test_the_stored_table_is_whole_and_says_what_was_compiled(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    with certificate.STORED.open(newline="") as file:
        *stored, last = csv.DictReader(file)
    names = ("op", "target", "shape", "dtype")
    key_of = {case: certificate.stored_line(case, rows[str(case)][0]) for case in certificate.CASES}
    by_case: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in stored:
        by_case.setdefault(tuple(line[name] for name in names), []).append(line)
    assert len(by_case) == len(certificate.ALL_CASES)
    assert not [line for line in stored if "expected" in line["note"] or "spills" in line["note"]]
    if last["op"] != f"Triton {triton.__version__}":
        pytest.skip(f"the table was made by {last['op']}")
    for case, first in key_of.items():
        now = [certificate.stored_line(case, row) for row in rows[str(case)]]
        assert now == by_case[tuple(first[name] for name in names)], "run `make certificates`"


@pytest.mark.parametrize("case", certificate.BAD_CASES, ids=str)
def test_bad_kernel_is_found(rows: dict[str, list[dict[str, Any]]], case: certificate.Case) -> None:
    (row,) = rows[str(case)]
    assert any(fault.startswith(certificate.BAD_CASES[case]) for fault in row["faults"])


@pytest.mark.parametrize("case", [c for c in certificate.CASES if c.shape == "-"], ids=str)
def test_an_update_and_its_norm_are_one_launch_each(
    rows: dict[str, list[dict[str, Any]]], case: certificate.Case
) -> None:
    if case.op.startswith(("adamw", "norm")):
        assert len(rows[str(case)]) == 1


def test_a_sample_above_one_program_takes_two_launches_only_where_it_must(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    def kernels(op: str, shape: str) -> list[str]:
        return [row["kernel"] for row in rows[f"{op}-sm_90-{shape}-bfloat16"]]

    assert kernels("projection", "DiT-512") == ["_projection_kernel"]
    assert kernels("projection", "SDXL") == ["_sums_kernel", "_projection_kernel"]
    assert kernels("consistency", "DiT-512") == ["_consistency_kernel"]

    assert kernels("matching", "DiT-512") == ["_matching_kernel"]
    assert kernels("matching", "SDXL") == ["_residual_kernel", "_matching_kernel"]
    assert kernels("matching_plain", "SDXL") == ["_matching_kernel"]
    assert kernels("denoising", "SDXL") == ["_denoising_kernel"]
