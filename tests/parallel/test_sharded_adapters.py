"""Diffusers models under FSDP2: one process' numbers, from each of the three ways to call them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_ranks
from tiny_models import FAMILIES, condition_of, tiny_adapter
from torch import Tensor

from fastdistill.optim import ArenaAdamW
from fastdistill.parallel import Parallel, Ranks
from fastdistill.parallel.units import gathering_units

BATCH = 4
LARGEST_UNIT = 20_000  # transformers' blocks, and smaller parts of UNets


def rows(value: Any, ranks: Ranks) -> Any:
    """This rank's samples of a tensor or a condition."""
    if isinstance(value, dict):
        return {name: rows(part, ranks) for name, part in value.items()}
    return None if value is None else value.chunk(ranks.size)[ranks.rank]


def train(ranks: Ranks, mode: Any, family: str) -> dict[str, Tensor]:
    """Two updates of a network as of a critic whose features a discriminator reads."""
    adapter = tiny_adapter(family)
    arena = Parallel(ranks, mode, largest_unit=LARGEST_UNIT).arena(adapter, "critic")
    optimizer = ArenaAdamW(arena, lr=1e-2, eps=1.0)
    x = torch.randn(BATCH, *adapter.sample_shape, generator=torch.Generator().manual_seed(3))
    t = torch.linspace(0.1, 0.9, BATCH)
    arguments = rows(t, ranks), rows(condition_of(adapter, BATCH), ranks)
    for _ in range(2):
        source = rows(x, ranks).clone().requires_grad_()
        with arena.frozen():  # the student's update
            raw, features = adapter.forward_with_features(source, *arguments)
        sum(value.square().mean() for value in features).backward()
        loss = adapter(source.detach(), *arguments).square().mean()  # the critic's
        for value in adapter.features(source.detach(), *arguments):
            loss = loss + value.square().mean()
        loss.backward()
        optimizer.step()
        arena.publish()
        optimizer.zero_grad()
    assert source.grad is not None
    parts = {"raw": raw.detach(), "gradient": source.grad / ranks.size}
    return arena.whole("parameter") | {name: ranks.gather(v) for name, v in parts.items()}


def train_all(ranks: Ranks, mode: Any) -> dict[str, dict[str, Tensor]]:
    return {family: train(ranks, mode, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def one_process():
    return train_all(Ranks(), "single")


@pytest.mark.parametrize("mode", ["fsdp", "resident"])
def test_two_ranks_give_one_ranks_numbers_for_every_architecture(one_process, mode):
    for sharded in run_ranks(2, train_all, mode, timeout=300):
        for family, expected in one_process.items():
            for name, value in expected.items():
                scale = value.abs().max().item()
                torch.testing.assert_close(
                    sharded[family][name],
                    value,
                    rtol=0,
                    atol=1e-4 * scale,
                    msg=lambda text, place=f"{family} {name}": f"{place}: {text}",
                )


def test_what_dit_calls_from_outside_of_its_block_is_a_unit_of_its_own():
    names = gathering_units(tiny_adapter("dit"), LARGEST_UNIT)
    assert names[:2] == ["model.transformer_blocks.0.norm1.emb", "model.transformer_blocks.0"]


def test_a_model_small_enough_to_be_one_unit_is_the_roots():
    adapter = tiny_adapter("sd15")
    bound = sum(parameter.numel() for parameter in adapter.parameters())
    names = gathering_units(adapter, bound)  # features() does not call the model itself
    assert "model.mid_block" in names
    assert "model" not in names
