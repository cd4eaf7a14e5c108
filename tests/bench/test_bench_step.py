"""The benchmark of whole cycles: both loops train, and the counters count."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bench import bench_step, device_step
from bench.counters import bytes_of, count
from bench.cycles import REDUCED, EagerCycle, OurCycle, Setting

CPU = torch.device("cpu")
TINY = {
    "sdxl": {"block_out_channels": [32, 32, 32], "sample_size": 8, "layers_per_block": 1},
    "dit": {"num_layers": 2, "attention_head_dim": 8, "sample_size": 8},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, changes in TINY.items():
        monkeypatch.setitem(REDUCED, name, REDUCED[name] | changes)


def test_kernels_waits_and_bytes_are_counted():
    x = torch.ones(1000)

    def run() -> float:
        y = x + 1  # 4,000 bytes
        z = y.view(10, 100).T * 2  # 4,000 bytes more
        del y
        return (z.sum() + (x * 3).sum()).item()  # y's place is free again

    found = count(run)
    assert (found.kernels, found.waits) == (6, 1)
    assert 8000 <= found.peak < 8100


def test_held_bytes_are_of_memory_not_of_views():
    flat = torch.zeros(100)
    assert bytes_of([flat, flat[:50], flat[50:].view(5, 10), torch.zeros(3)]) == 400 + 12


@pytest.mark.parametrize("model", ["sdxl", "dit_xl2_256"])
def test_both_loops_train_student_and_critic(model):
    setting = Setting(model, 2, True, CPU)
    eager, ours = EagerCycle(setting, "float32"), OurCycle(setting, "float32")
    networks = ours.trainer.objective.networks()
    for role in ("student", "critic"):
        pairs = [
            (nn.utils.parameters_to_vector(network.parameters()).clone(), network)
            for network in (eager.networks[role], networks[role])
        ]
        assert torch.equal(pairs[0][0], pairs[1][0])  # the loops begin alike
    eager.run(), ours.run()
    found = ours.trainer.metrics.read()
    for role, (loss, norm) in eager.log.items():
        assert loss > 0
        assert norm > 0
        assert found[f"{role}/grad_norm"] > 0
        assert found[f"{role}/skipped"] == 0
    assert ours.trainer.student_updates == 1
    # The critic starts alike and sees like samples: its losses are of one size.
    assert eager.log["critic"][0] == pytest.approx(found["critic/loss"], rel=0.5)


def test_low_precision_loops_train_too():
    setting = Setting("dit_xl2_256", 2, True, CPU)
    for precision in ("autocast", "bfloat16"):
        eager = EagerCycle(setting, precision)
        before = eager.masters["student"][0].clone()
        eager.run()
        assert not torch.equal(eager.masters["student"][0], before)
    ours = OurCycle(setting, "bfloat16")
    ours.run()
    assert ours.trainer.metrics.read()["student/skipped"] == 0


def test_a_shared_forward_and_reused_samples_are_less_work():
    setting = Setting("dit_xl2_256", 2, True, CPU)
    eager = EagerCycle(setting, "float32")
    whole = OurCycle(setting, "float32", **bench_step.DROPPED)
    fewer = OurCycle(setting, "float32", **bench_step.ALL)
    counts = []
    for cycle in (eager, whole, fewer):
        cycle.run()
        counts.append(count(cycle.run, cycle.on_host()))
    assert counts[0].kernels > counts[1].kernels > counts[2].kernels
    assert [found.waits for found in counts] == [12, 0, 0]


def test_the_page_has_a_row_for_each_loop(tmp_path, monkeypatch):
    chosen = {name: bench_step.VARIANTS[name] for name in (bench_step.EAGER, bench_step.OURS)}
    monkeypatch.setattr(bench_step, "VARIANTS", chosen)
    rows = bench_step.measure(Setting("dit_xl2_256", 2, True, CPU), rounds=1)
    page = bench_step.markdown({"cpu": "one"}, rows)
    assert [row.variant for row in rows] == list(chosen)
    assert rows[0].ratio == 1.0
    assert rows[1].held > 0
    assert "| fastdistill |" in page
    json.dumps([row.__dict__ for row in rows])


def test_the_device_script_measures_a_row_and_its_parts():
    setting = Setting("dit_xl2_256", 2, True, CPU)
    row = device_step.measure(setting, "fastdistill, share_critic_forward", seconds=0.0)
    assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
    assert set(row["parts"]) == {
        "student's forward",
        "teacher's and critic's forward, gradient of the sample",
        "critic's forward and loss",
        "backward",
        "optimizer",
    }
    assert 0 < sum(row["parts"].values()) < 3 * row["seconds"]
    rows = [
        {"setting": setting.label, "variant": "eager loop", **row, "seconds": 2 * row["seconds"]},
        {"setting": setting.label, "variant": "fastdistill", **row},
        {"setting": setting.label, "variant": "fastdistill, all", "failed": "out of memory"},
    ]
    page = device_step.markdown({"gpu": "none"}, rows)
    assert "| 2.00 |" in page
    assert "out of memory" in page


def test_the_device_script_has_a_row_for_every_lever_and_setting():
    rows = list(device_step.rows_in_order(torch.device("cuda"), small=False))
    assert len(rows) == len(device_step.SETTINGS) * len(device_step.VARIANTS) == len(set(rows))
    settings = {(setting.model, setting.batch) for setting, _ in rows}
    assert {("sdxl", 1), ("sdxl", 2), ("sdxl", 6)} < settings
    eager = [variant for _, variant in rows].index("eager loop")
    assert eager == 0
    rehearsed = [variant for _, variant in device_step.rows_in_order(CPU, small=True)]
    assert not any("cuda_graph" in variant for variant in rehearsed)
