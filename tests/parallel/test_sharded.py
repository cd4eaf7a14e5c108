"""FSDP2 in an arena: the numbers of FSDP2 outside one and of one process, bit for bit where due."""

from __future__ import annotations

import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn

from fastdistill.optim import Arena, ArenaAdamW
from fastdistill.parallel import Ranks, ShardedArena, shard

UPDATES = 6


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width + 1)
        self.outer = nn.Linear(2 * width + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


class Network(nn.Module):
    """Uneven rows, a tied weight, a frozen layer, a parameter of one row."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.enter = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.leave = nn.Linear(width, 5)
        self.again = nn.Linear(width, 5)
        self.again.weight = self.leave.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        x = self.frozen(x) * self.scale
        return self.leave(x) + self.again(x)


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def samples(update: int, micro: int) -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * update + micro))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def loss_of(net: nn.Module, ranks: Ranks, update: int, micro: int) -> Tensor:
    own = 8 // ranks.size
    x = samples(update, micro)[ranks.rank * own : (ranks.rank + 1) * own]
    return net(x).square().sum(1).mean()


def train_in_arena(
    ranks: Ranks, resident: bool, accumulation: int, shards: int | None = None, **options
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and weights by name after all updates."""
    net = network()
    if ranks.size == 1:
        arena: Arena = Arena(net, averages=1)
    else:
        shard(net, ranks.mesh(shards), resident=resident, largest_unit=130)
        arena = ShardedArena(net, prefetch=resident, averages=1)
        assert arena.attached
    optimizer = ArenaAdamW(arena, lr=1e-2, max_norm=1.0, ema_decays=[0.5], **options)
    losses = []
    for update in range(UPDATES):
        for micro in range(accumulation):
            arena.reduce_gradients(micro == accumulation - 1)
            loss = loss_of(net, ranks, update, micro)
            loss.backward()
            losses.append(ranks.gather(loss.detach()[None]).mean().item())
        optimizer.step()
        optimizer.zero_grad()
        arena.publish()
    roles = {"parameter", "ema_0", "exp_avg", "exp_avg_sq"}
    state = {
        f"{role}.{name}": whole(value)
        for role in roles
        for name, value in arena.named(arena.ranges[role]).items()
    }
    return losses, state


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_is_unsharded_to_rounding(size, accumulation):
    losses, state = train_in_arena(Ranks(), True, accumulation)
    for resident in (True, False):
        results = run_ranks(size, train_in_arena, resident, accumulation)
        for other_losses, other in results:
            torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-6)
            for name, value in state.items():
                torch.testing.assert_close(other[name], value, rtol=2e-4, atol=2e-6, msg=name)
