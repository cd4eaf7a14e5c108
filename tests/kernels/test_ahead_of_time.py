"""The machine code of every kernel on GPUs that are not here: no spills, every byte moved once.

`certificate.py` compiles in processes of its own, since this one interprets. For sm_80, sm_90,
sm_100 and gfx942 it proves: no stack and no spills; accesses of 128 bits to everything that is as
large as a sample; no float64 arithmetic; int64 offsets of samples; and, since these kernels are
straight-line, that a program loads and stores exactly the bytes that its formula needs.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import certificate
import pytest

pytestmark = [pytest.mark.ahead_of_time, pytest.mark.slow]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Rows of the certificate by case; `pytest -s` shows its table."""
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
    print(result.stdout)
    assert (folder / "rows.json").exists(), result.stderr
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((folder / "rows.json").read_text()):
        by_case.setdefault(row["case"], []).append(row)
    return by_case


@pytest.mark.parametrize("case", certificate.CASES, ids=str)
def test_kernel_is_certified(rows: dict[str, list[dict[str, Any]]], case: certificate.Case) -> None:
    assert rows[str(case)]
    assert [row["faults"] for row in rows[str(case)] if row["faults"]] == []


@pytest.mark.parametrize("case", certificate.BAD_CASES, ids=str)
def test_bad_kernel_is_found(rows: dict[str, list[dict[str, Any]]], case: certificate.Case) -> None:
    (row,) = rows[str(case)]
    assert any(fault.startswith(certificate.BAD_CASES[case]) for fault in row["faults"])


def test_a_sample_above_one_program_takes_two_launches_only_where_it_must(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    def kernels(op: str, shape: str) -> list[str]:
        return [row["kernel"] for row in rows[f"{op}-sm_90-{shape}-bfloat16"]]

    assert kernels("matching", "DiT-512") == ["_matching_kernel"]
    assert kernels("matching", "SDXL") == ["_residual_kernel", "_matching_kernel"]
    assert kernels("matching_plain", "SDXL") == ["_matching_kernel"]
    assert kernels("denoising", "SDXL") == ["_denoising_kernel"]
