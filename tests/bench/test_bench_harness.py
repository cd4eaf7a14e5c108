"""The harness refuses what is wrong, walks through its buffers and counts what it says."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from bench import suite, timers
from bench.harness import (
    CEILINGS,
    GRAPH,
    OURS,
    Case,
    Row,
    Variant,
    Walk,
    measure,
    near,
    prove,
    tensors,
)
from bench.peers import split_like_a_network, standard_normal

CPU = torch.device("cpu")


def doubling(variants, in_place=False):
    """A case whose op doubles a tensor of 1,000 numbers."""
    return Case(
        *("double", "1000", torch.float32, 8000),
        make=lambda generator: (torch.randn(1000, generator=generator),),
        variants={
            name: function if isinstance(function, Variant) else bound(function)
            for name, function in variants.items()
        },
        judge=lambda inputs: near((2 * inputs[0].double(),), 1e-6),
        ceiling="scale" if in_place else "copy",
        in_place=in_place,
    )


def bound(function):
    return Variant(lambda inputs: lambda: (function(inputs[0]),))


def timed(case, seconds=0.01):
    rows = measure(case, timers.CpuTimer(), seconds, 2)
    return {row.variant: row for row in rows}


def test_right_variants_are_timed_beside_the_ceiling():
    rows = timed(doubling({OURS: lambda x: 2 * x, "eager": lambda x: x + x}))
    assert list(rows) == [CEILINGS["copy"], OURS, "eager"]
    assert rows[OURS].ratio == 1.0
    for row in rows.values():
        assert row.microseconds > 0
        assert row.gigabytes_per_second == pytest.approx(8000 / row.microseconds / 1e3)
        assert not row.note
    assert rows[CEILINGS["copy"]].ceiling == 1.0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: 2.001 * x, "off by"),
        (lambda x: 2 * x.where(x < 3, torch.nan), "off by nan"),
        (lambda x: 2 * x[1:], "has shape"),
        (lambda x: x.no_such_method(), "failed: AttributeError"),
    ],
)
def test_a_wrong_variant_is_refused_and_gets_no_time(wrong, reason):
    rows = timed(doubling({OURS: lambda x: 2 * x, "rival": wrong}))
    assert reason in rows["rival"].note
    assert rows["rival"].microseconds is None
    assert rows["rival"].ratio is None
    assert not suite.ours_is_wrong(list(rows.values()))


def test_where_ours_is_wrong_the_run_fails_and_no_rival_gets_a_ratio():
    rows = timed(doubling({OURS: lambda x: 3 * x, "rival": lambda x: 2 * x}))
    assert "wrong result, refused" in rows[OURS].note
    assert rows["rival"].ratio is None
    assert suite.ours_is_wrong(list(rows.values()))


def test_the_number_of_results_must_be_right():
    judge = near((torch.ones(2, dtype=torch.float64),), 1e-6)
    assert judge((torch.ones(2),)) is None
    assert judge((torch.ones(2), torch.ones(2))) == "2 results; expected 1"


def test_variants_in_place_are_proven_on_fresh_inputs():
    def in_place(x):
        return x.mul_(2)

    case = doubling({OURS: in_place, "rival": in_place}, in_place=True)
    assert prove(case, case.variants, CPU) == {}
    assert CEILINGS["scale"] in timed(case)


def test_every_variant_walks_through_all_sets_of_inputs():
    timer = timers.CpuTimer()
    timer.rotation_bytes = 10 * 4000
    seen = set()

    def spy(x):
        seen.add(x.data_ptr())
        return 2 * x

    measure(doubling({OURS: spy}), timer, 0.01, 2)
    assert len(seen) in (10, 11)  # one more where the set that it is proven on lies elsewhere


class CapturingTimer(timers.CpuTimer):
    """Stands in for a GPU's: what it captures, it runs."""

    def __init__(self):
        super().__init__()
        self.captures = True

    def capture(self, runs):
        for run in runs:
            run()
        return lambda: [run() for run in runs]


def test_graph_replays_are_timed_beside_what_they_replay():
    def cannot(x):
        if sys._getframe(2).f_code.co_name == "capture":
            raise RuntimeError("no capture\nof this")
        return 2 * x

    variants = {OURS: lambda x: 2 * x, "stubborn": cannot}
    variants["waiting"] = Variant(bound(variants[OURS]).bind, waits=True)
    rows = {row.variant: row for row in measure(doubling(variants), CapturingTimer(), 0.01, 2)}
    graphs = {name for name in rows if name.endswith(GRAPH)}
    assert graphs == {OURS + GRAPH, "stubborn" + GRAPH}
    assert rows[OURS + GRAPH].microseconds > 0
    assert rows["stubborn" + GRAPH].note == "cannot be captured: no capture"
    assert rows["stubborn"].microseconds > 0


def test_sets_stop_at_the_memory_that_they_may_take():
    timer = timers.CpuTimer()
    timer.rotation_bytes, timer.memory_bytes = 10 * 4000, 3 * 4000
    case, made = doubling({OURS: lambda x: 2 * x}), []

    def make(generator):
        made.append(generator.initial_seed())
        return case.make(generator)

    rows = measure(dataclasses.replace(case, make=make), timer, 0.01, 2)
    assert made == [0, 0, 1, 2]  # the first to prove the variants on
    assert not rows[0].cold


def test_a_walk_counts_its_calls():
    calls = []
    walk = Walk([lambda: calls.append("a"), lambda: calls.append("b")])
    walk()
    assert walk.calls == 1
    walk.warm_up(timers.CpuTimer(), 0.001)
    calls.clear()
    walk()
    assert walk.calls == len(calls) > 1
    assert calls.count("a") == pytest.approx(len(calls) / 2, abs=1)


def test_peak_memory_counts_temporaries_and_results():
    x = torch.ones(2**18)  # 1 MiB
    peak = timers.CpuTimer().peak_bytes
    assert peak(lambda: x.mul_(1)) < 2**10
    assert peak(lambda: x + 1) == pytest.approx(2**20, rel=0.01)
    assert peak(lambda: (x + 1) * 2) == pytest.approx(2 * 2**20, rel=0.01)
    assert peak(lambda: ((x + 1).mul_(2), None)[1]) == pytest.approx(2**20, rel=0.01)


def test_cpu_time_is_near_the_time_of_busy_work():
    timer = timers.CpuTimer()
    assert timer.cpu(lambda: sum(range(10**5)), 1.0) == pytest.approx(1.0, abs=0.7)


def test_bystanders_are_noticed():
    bystanders = timers.Bystanders()
    burn = [sys.executable, "-c", "import time\nwhile time.process_time() < 1.5: pass"]
    subprocess.run(burn, check=True)
    assert bystanders.share() > 0.5 / os.cpu_count()


def test_noise_is_judged_by_its_moments():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(10**5, generator=generator)
    assert standard_normal(noise) is None
    assert standard_normal(noise.bfloat16()) is None
    for wrong in (noise + 0.1, 1.1 * noise, noise.abs(), torch.rand(10**5, generator=generator)):
        assert "moment" in standard_normal(wrong)
    assert standard_normal(noise * torch.nan) is not None


def test_a_network_s_pieces_are_views_of_everything():
    flat = torch.arange(100_000.0)
    pieces = split_like_a_network(flat)
    assert len(pieces) == 60
    assert torch.equal(torch.cat(pieces), flat)
    assert pieces[5].data_ptr() == flat[int(pieces[5][0]) :].data_ptr()


def test_tensors_of_nested_inputs_are_found():
    a, b = torch.ones(1), torch.ones(2)
    assert [value.numel() for value in tensors((a, [b, 3.0], None))] == [1, 2]


def test_ops_are_chosen_by_name():
    assert suite.choose(None) == list(suite.OPS)
    assert suite.choose("normal,renoise") == ["normal", "renoise"]
    with pytest.raises(ValueError, match="no benchmark of renose"):
        suite.choose("renose,normal")


@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_devices_that_are_not_there_are_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--device is {name}"):
        suite.find_device(name)


def test_first_cases_of_all_ops_come_before_second_ones(monkeypatch):
    first, second = (doubling({OURS: lambda x: 2 * x}) for _ in range(2))
    second = dataclasses.replace(second, shape="second")
    monkeypatch.setattr(suite, "OPS", dict.fromkeys("ab", lambda *_: iter((first, second))))
    ran = [rows[0].shape for rows in suite.run(["a", "b"], CPU, small=True)]
    assert ran == ["1000", "1000", "second", "second"]
    assert len(list(suite.run(["a", "b"], CPU, quick=True))) == 2


def test_cases_past_the_deadline_are_named_and_not_run(monkeypatch):
    case = doubling({OURS: lambda x: 2 * x})
    monkeypatch.setattr(suite, "OPS", {"double": lambda *_: iter((case,))})
    ((row,),) = suite.run(["double"], CPU, small=True, until=0.0)
    assert row.note == "not run: out of time"
    assert row.microseconds is None
    assert isinstance(row, Row)
