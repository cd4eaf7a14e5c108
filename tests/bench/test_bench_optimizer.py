"""The optimizer's benchmark: its byte model, its networks, and that a rehearsal of it passes."""

from __future__ import annotations

import pytest
import torch

from bench import bench_optimizer, device, suite
from bench.bench_optimizer import SDXL, SDXL_TENSORS, Setting
from bench.networks import sdxl_unet
from bench.timers import CpuTimer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 42),
        ({"gradient": torch.bfloat16}, 38),
        ({"gradient": torch.bfloat16, "moments": "8bit"}, 26.0625),
        ({"copy": False}, 40),
        ({"copy": False, "backward": True}, 64),
    ],
)
def test_bytes_a_parameter(options, expected):
    assert Setting(1600, 4, **options).bytes_moved == 1600 * expected


def test_1680_tensors_are_sdxl_s():
    real = [parameter.numel() for parameter in sdxl_unet().parameters()]
    assert Setting(SDXL, SDXL_TENSORS).sizes() == real
    scaled = Setting(100_000_000, SDXL_TENSORS).sizes()
    assert len(scaled) == SDXL_TENSORS
    assert sum(scaled) == 100_000_000
    assert scaled.count(round(1638400 * 1e8 / SDXL)) == real.count(1638400)


def test_60_tensors_and_tensors_of_one_element():
    sizes = Setting(100_000_000, 60).sizes()
    assert (len(sizes), sum(sizes)) == (60, 100_000_000)
    assert Setting(1680, 1680).sizes() == [1] * 1680
    assert Setting(1680, 1680).label == "1,680 of 1 element, copy"
    assert Setting(SDXL, 1680, moments="8bit").label == "2,567M in 1,680, copy, 8bit"


def test_an_update_waits_for_nothing_and_a_replay_equals_it(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "OPS", {"optimizer": bench_optimizer.cases})
    options = device.Options(tmp_path, CPU, small=True, seconds=100.0)
    assert device.check_sync(options)
    assert device.check_graphs(options)


def test_no_update_of_ours_allocates():
    for case in bench_optimizer.cases(CPU, True):
        run = case.variants["fastdistill"].bind(case.make(torch.Generator().manual_seed(0)))
        most = 4 * 10_000 if "backward" in case.shape else 2**10
        assert CpuTimer().peak_bytes(run) <= most, case.shape
