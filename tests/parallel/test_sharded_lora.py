"""LoRA over several ranks: a student with a base of another dtype, a critic on a shared base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_ranks
from tiny_models import condition_of, tiny_denoiser
from torch import Tensor

from fastdistill.models import Denoiser
from fastdistill.models.lora import add_lora, shared_lora_critic
from fastdistill.optim import ArenaAdamW
from fastdistill.parallel import Parallel, Ranks

BATCH, LARGEST_UNIT = 4, 20_000
WAYS = [
    (kind, family, mode, dtype, sharded)
    for family, dtype in (("sdxl", "float32"), ("dit", "bfloat16"))
    for kind, mode, sharded in (
        ("own", "fsdp", False),
        ("own", "resident", False),
        ("shared", "fsdp", False),
        ("shared", "resident", True),
    )
]


def train(
    ranks: Ranks, kind: str, family: str, mode: Any, dtype: str, sharded: bool
) -> dict[str, Tensor]:
    """Two updates of LoRA weights beside calls of the teacher."""
    teacher = tiny_denoiser(family).requires_grad_(False)
    low = torch.bfloat16 if dtype == "bfloat16" else None
    teacher.to(low or torch.float32)
    teacher.input_dtype = low
    if kind == "own":
        trained: Denoiser = tiny_denoiser(family).to(low or torch.float32)
        trained.input_dtype = low
        add_lora(trained.network, rank=3)
    else:
        trained = shared_lora_critic(teacher, rank=3)
    parallel = Parallel(ranks, mode, largest_unit=LARGEST_UNIT)
    if sharded and mode != "single":
        parallel.shard(teacher)
    arena = parallel.arena(trained, "critic", compute_dtype=low)
    optimizer = ArenaAdamW(arena, lr=1e-2, eps=1e-3)
    network = teacher.network
    x = torch.randn(BATCH, *network.sample_shape, generator=torch.Generator().manual_seed(3))
    condition = condition_of(network, BATCH)
    mine = slice(ranks.rank * BATCH // ranks.size, (ranks.rank + 1) * BATCH // ranks.size)
    if isinstance(condition, dict):
        condition = {name: value[mine] for name, value in condition.items()}
    else:
        condition = condition[mine]
    arguments = x[mine], torch.linspace(100, 800, BATCH)[mine], condition
    for _ in range(2):
        with torch.no_grad():
            before = teacher(*arguments)
        trained(*arguments).square().mean().backward()
        optimizer.step()
        arena.publish()
        optimizer.zero_grad()
    with torch.no_grad():
        output = {"teacher": before, "trained": trained(*arguments)}
    return arena.whole("parameter") | {k: ranks.gather(v) for k, v in output.items()}


def train_all(ranks: Ranks) -> list[dict[str, Tensor]]:
    return [train(ranks, *way) for way in WAYS]


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, train_all, timeout=300)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_two_ranks_train_lora_as_one_does(two_ranks, way):
    kind, family, _, dtype, _ = way
    expected = train(Ranks(), kind, family, "single", dtype, False)
    tolerance = 1e-4 if dtype == "float32" else 6e-2
    for found in (results[WAYS.index(way)] for results in two_ranks):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = (found[name] - value).abs().max() / value.abs().max()
            assert error < tolerance, name
