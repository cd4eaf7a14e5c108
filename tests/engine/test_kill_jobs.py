"""Jobs killed with kill -9 and resumed, alone or over other processes, end as if they were not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdistill.models.pretrained import load_pretrained

NAMES = ["sdxl_dmd2_1step", "dit_xl2_256", "pixart_sim", "sd3_medium"]


def script(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kill_jobs.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    script("kills", folder, *NAMES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_job_ends_bitwise_as_the_uninterrupted_one(name, killed):
    whole, resumed = killed / name / "whole", killed / name / "killed"
    same = ["metrics.jsonl", "student/model.safetensors"]
    same += [
        str(file.relative_to(whole))
        for pattern in ("checkpoints/*-*/*.safetensors", "pairs/*", "warmup/*.safetensors")
        for file in sorted(whole.glob(pattern))
    ]
    assert len(same) >= 4
    for file in same:
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moved")
    script("modes", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resident", "fsdp", "single"])
def test_a_killed_job_that_continues_over_other_processes_ends_with_the_same_student(mode, moved):
    """SDXL with backward simulation, guidance and GAN: four ranks, then fewer; one, then two."""
    alone, found = (
        load_file(moved / name / "student" / "model.safetensors") for name in ("alone", mode)
    )
    start = load_pretrained(moved / "sdxl").denoiser.network.state_dict()
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)
    travelled = max(float((alone[name] - start[name]).abs().max()) for name in alone)
    assert travelled > 1e-4, "the tolerance says something"


@pytest.mark.slow
def test_low_rank_roles_upon_a_shared_base_are_the_same_over_sharded_ranks(moved):
    alone, found = (
        load_file(moved / f"low-rank-{kind}" / "student" / "model.safetensors")
        for kind in ("alone", "fsdp")
    )
    updates = [name for name in alone if "lora_B" in name]
    assert max(float(alone[name].abs().max()) for name in updates) > 1e-3
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)
