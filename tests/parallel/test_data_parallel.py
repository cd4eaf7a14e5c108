"""`ArenaAdamW` under torch's DistributedDataParallel, and a parameter that is sharded already."""

from __future__ import annotations

import pytest
import torch
from processes import run_ranks
from torch import nn
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastdistill.optim import Arena, ArenaAdamW
from fastdistill.parallel import Ranks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32, 5))


def train(ranks: Ranks, make, buckets_as_gradients: bool, wrapped_first: bool) -> list:
    """Weights after four updates of two backward passes, the first without exchange."""
    net = network().to(memory_format=torch.channels_last)
    if wrapped_first:
        model = DistributedDataParallel(net, gradient_as_bucket_view=buckets_as_gradients)
        optimizer = make(model.parameters(), lr=1e-2)
    else:
        optimizer = make(net.parameters(), lr=1e-2)
        model = DistributedDataParallel(net, gradient_as_bucket_view=buckets_as_gradients)
    for update in range(4):
        generator = torch.Generator().manual_seed(10 * update + ranks.rank)
        x = torch.randn(2, 4, 3, 4, 4, generator=generator)
        with model.no_sync():
            model(x[0]).square().mean().backward()
        model(x[1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [value.detach().clone() for value in net.parameters()]


def compare(ranks: Ranks) -> list:
    theirs = train(ranks, torch.optim.AdamW, False, False)
    for as_gradients in (True, False):
        for wrapped_first in (True, False):
            mine = train(ranks, ArenaAdamW, as_gradients, wrapped_first)
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-7)
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), ranks.mesh()))
    with pytest.raises(ValueError, match="a is a DTensor; the arena of a sharded network is made"):
        Arena([("a", sharded)])
    return mine


def test_data_parallel_training_is_that_of_torch():
    first, second = run_ranks(2, compare)
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine, other)
    for start, mine in zip(network().parameters(), first, strict=True):
        assert not torch.equal(start, mine)
