"""Whole steps on a GPU: replayed from a CUDA graph they are the eager ones, bit by bit.

TRITON_INTERPRET=0 python -m pytest -m device tests/device
"""

from __future__ import annotations

import pytest
import torch

from bench.cycles import OurCycle, Setting

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has graphs"),
]

OPTIONS = {
    "plain": {},
    "reuse, shared forward": {
        "training": {"sample_reuse": 3},
        "matching": {"share_critic_forward": True},
    },
    "dropped gradients": {"training": {"drop_gradients": True}},
    "8-bit moments": {"training": {"moments": "8bit"}},
    "compiled blocks": {"training": {"compile": "blocks"}},
}


def cycle(model: str, graph: bool, training=None, **options) -> OurCycle:
    training = {**(training or {}), "cuda_graph": graph}
    setting = Setting(model, 2, True, torch.device("cuda"))
    return OurCycle(setting, "bfloat16", training=training, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("model", ["sdxl", "dit_xl2_256"])
def test_replayed_steps_are_the_eager_ones_bit_by_bit(model, options):
    """Bit by bit where eager steps repeat so; else they differ no more than eager ones do."""
    eager, again, replayed = (cycle(model, graph, **options) for graph in (False, False, True))
    for _ in range(6):
        eager.run(), again.run(), replayed.run()
    assert len(replayed.trainer._graphs._replays) >= 2
    for role, arena in eager.trainer.arenas.items():
        for name, expected in arena.ranges.items():
            other, found = (made.trainer.arenas[role].ranges[name] for made in (again, replayed))
            bound = 4 * distance(other, expected)
            assert distance(found, expected) <= bound, (role, name)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def test_a_replayed_step_never_waits():
    made = cycle("dit_xl2_256", graph=True)
    for _ in range(4):
        made.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_from_cycle_to_cycle():
    made = cycle("dit_xl2_256", graph=True)
    for _ in range(4):
        made.run()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        made.run()
    assert torch.cuda.memory_allocated() == before
