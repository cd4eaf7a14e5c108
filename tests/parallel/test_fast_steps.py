"""Compiled blocks and replayed steps over several processes are those of plain ones."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from small_training import Setup, make_trainer, train, whole_state

from fastdistill.engine import trainer as training
from fastdistill.engine.graphs import StepGraphs
from fastdistill.models.compiling import compile_blocks
from fastdistill.parallel import Ranks, _fsdp2
from fastdistill.parallel.ranks import _all_gather

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from recorded_steps import RecordedCapture

GRAPHS = (
    "training.cuda_graph=true",
    "training.accumulation=2",
    "training.batch_size=8",
    "training.sample_reuse=2",
    "training.critic_updates_per_student_update=3",
    "training.student={lr: 1.0e-3, schedule: cosine, clip_norm: 1.0}",
)
STEPS = 15


class _Eager:
    def warm_up(self, step) -> None:
        step()

    def capture(self, step):
        return step


def reduce_scatter(output, given, op, group, async_op) -> None:
    """In ops that can be recorded: gloo's own copies its result while Python waits for it."""
    assert not async_op
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    whole = given.new_empty(size * len(given))
    _all_gather(whole, given, group=group)
    parts = whole.view(size, size, -1)[:, rank]
    output.copy_(parts.mean(0) if op == dist.ReduceOp.AVG else parts.sum(0))


def replayed(ranks: Ranks, mode: str, low: bool) -> list[str]:
    """Compare replayed steps with eager ones; returns what the capture did."""
    capture = RecordedCapture()
    training.make_capture = lambda device, streams: capture
    _fsdp2._reduce_scatter = reduce_scatter
    options = (*GRAPHS, "training.precision=bfloat16") if low else GRAPHS
    made, eager = (make_trainer(ranks, Setup(mode, overrides=options)) for _ in range(2))
    eager._graphs = StepGraphs(_Eager())
    for _ in range(STEPS):
        made.update()
        eager.update()
    with made.averaged():  # other weights are gathered, and the usual ones again
        pass
    for _ in range(3):
        made.update()
        eager.update()
    found, expected = whole_state(made), whole_state(eager)
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different
    return capture.events


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_replayed_resident_steps_are_the_eager_ones_bit_by_bit(low):
    """Gathered weights stay at one address, and gradients land in the arena."""
    for events in run_ranks(2, replayed, "resident", low):
        assert events.count("capture") == 3
        assert events.count("replay") >= 9


def same_as_ever(ranks: Ranks) -> None:
    """Static gathers change no number."""
    training.make_capture = lambda device, streams: _Eager()
    overrides = ("training.critic_updates_per_student_update=2",)
    states = []
    for options in (overrides, (*overrides, "training.cuda_graph=true")):
        made = make_trainer(ranks, Setup("resident", overrides=options))
        for optimizer in made.optimizers.values():
            optimizer._rate = None  # a device's float32 rate differs by rounding
        for _ in range(6):
            made.update()
        states.append(whole_state(made))
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_weights_gathered_within_the_update_change_no_number():
    run_ranks(2, same_as_ever)


def refused(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="cuda_graph is for modes single and resident"):
        make_trainer(ranks, Setup("fsdp", overrides=("training.cuda_graph=true",)))


def test_fully_sharded_weights_have_no_graph():
    run_ranks(2, refused)


def compiled(ranks: Ranks, mode: str) -> tuple:
    training.compile_blocks = functools.partial(compile_blocks, backend="eager")
    return train(ranks, Setup(mode, steps=6, overrides=("training.compile=blocks",)))


@pytest.mark.parametrize("mode", ["resident", "fsdp"])
def test_compiled_blocks_train_as_plain_ones_in_every_mode(mode):
    """FSDP2's hooks stay outside of what is compiled, also where a block is a gathering unit."""
    found = run_ranks(2, compiled, mode)[0]
    expected = run_ranks(2, train, Setup(mode, steps=6))[0]
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7, msg=name)
