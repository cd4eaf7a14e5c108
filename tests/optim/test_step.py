"""`OptimizerStep` against torch's AdamW, the schedules, and the averages."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastdistill.optim import Arena, OptimizerStep, learning_rate_factor


def networks() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    network = nn.Linear(5, 3)
    return network, copy.deepcopy(network)


def gradient(network: nn.Module, seed: int, factor: float = 1.0) -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    (factor * network(x).square().sum()).backward()


def test_steps_are_those_of_torch_with_clipping_and_schedule():
    mine, theirs = networks()
    step = OptimizerStep(
        Arena(mine),
        1e-2,
        20,
        betas=(0.5, 0.9),
        weight_decay=0.1,
        schedule="cosine",
        warmup=3,
        clip_norm=2.0,
    )
    adamw = torch.optim.AdamW(theirs.parameters(), 1e-2, betas=(0.5, 0.9), weight_decay=0.1)
    for update in range(8):
        gradient(mine, update), gradient(theirs, update)
        result = step.step(update)
        adamw.param_groups[0]["lr"] = 1e-2 * learning_rate_factor(update, 20, "cosine", 3)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 2.0)
        adamw.step(), adamw.zero_grad()
        torch.testing.assert_close(result["grad_norm"], norm)
    torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    mine, _ = networks()
    step = OptimizerStep(Arena(mine, averages=1), 1e-2, 20, clip_norm=1.0, half_lives=[3])
    gradient(mine, 0), step.step(0)
    before = {role: value.clone() for role, value in step.arena.ranges.items()}
    gradient(mine, 1, bad)
    assert step.step(1)["skipped"] == 1
    assert all(torch.equal(step.arena.ranges[role], before[role]) for role in before)
    assert {name: int(count) for name, count in step.optimizer.counts.items()} == {
        "step": 1,
        "skipped": 1,
    }
    gradient(mine, 2)
    assert step.step(2)["skipped"] == 0
    assert not torch.equal(step.arena.ranges["parameter"], before["parameter"])


def test_a_loaded_state_continues_bitwise():
    mine, theirs = networks()
    first = OptimizerStep(Arena(mine), 1e-2, 20)
    for update in range(3):
        gradient(mine, update), first.step(update)
    second = OptimizerStep(Arena(theirs), 1e-2, 20)
    theirs.load_state_dict(mine.state_dict())
    saved, loaded = first.state(), second.state()
    for name, value in saved.tensors.items():
        loaded.tensors[name].copy_(value)
    loaded.commit()
    for network, step in ((mine, first), (theirs, second)):
        gradient(network, 9), step.step(3)
    assert torch.equal(mine.weight, theirs.weight)


def test_schedules():
    line = [learning_rate_factor(n, 14, "linear", warmup=4, final=0.2) for n in range(15)]
    assert line[:4] == [0.25, 0.5, 0.75, 1.0]
    assert line[4] == 1.0
    assert line[9] == pytest.approx(0.6)
    assert line[14] == pytest.approx(0.2)
    assert learning_rate_factor(5, 10, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(10, 10, "cosine", final=0.1) == pytest.approx(0.1)
    assert {learning_rate_factor(n, 10, "constant") for n in range(20)} == {1.0}


def test_the_average_follows_by_its_half_life():
    network, _ = networks()
    step = OptimizerStep(Arena(network, averages=1), 0.0, 20, half_lives=[5])
    average = step.arena.ranges["ema_0"]
    network.weight.data.fill_(1.0), network.bias.data.fill_(1.0)
    average.zero_()
    step.optimizer.counts["step"].fill_(1000)
    for update in range(5):
        gradient(network, update), step.step(update)
    with step.optimizer.averaged():
        torch.testing.assert_close(network.weight.detach(), torch.full((3, 5), 0.5))
    assert torch.equal(network.weight.detach(), torch.ones(3, 5))


def test_an_early_average_forgets_its_start():
    network, _ = networks()
    step = OptimizerStep(Arena(network, averages=1), 0.0, 20, half_lives=[1000])
    network.weight.data.fill_(1.0)
    for update in range(50):
        gradient(network, update), step.step(update)
    with step.optimizer.averaged():
        torch.testing.assert_close(network.weight, torch.ones(3, 5), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="half_life is 0"):
        OptimizerStep(Arena(nn.Linear(2, 2), averages=1), 0.1, 20, half_lives=[0])
