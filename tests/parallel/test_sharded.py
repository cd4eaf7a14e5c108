"""FSDP2 in an arena: the numbers of FSDP2 outside one and of one process, bit for bit where due."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastdistill.optim import Arena, ArenaAdamW
from fastdistill.parallel import Parallel, Ranks, ShardedArena, shard

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
    ranks: Ranks,
    resident: bool,
    accumulation: int,
    max_norm: float | None = 1.0,
    attached: bool = True,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and weights by name after all updates."""
    net = network()
    if ranks.size == 1:
        arena: Arena = Arena(net, averages=1)
    else:
        shard(net, ranks.mesh(), resident=resident, largest_unit=130)
        arena = ShardedArena(net, prefetch=resident, averages=1)
        assert arena.attached == attached
    optimizer = ArenaAdamW(arena, lr=1e-2, max_norm=max_norm, ema_decays=[0.5])
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


def train_outside_an_arena(ranks: Ranks, resident: bool) -> dict[str, Tensor]:
    """Weights by name after all updates of plain FSDP2 and torch's AdamW.

    The optimizer gets copies of the shards, one after the other and filled up to whole vectors: the
    last elements of a tensor that its vector code leaves to scalar code are rounded otherwise.
    """
    net = network()
    shard(net, ranks.mesh(), resident=resident, largest_unit=130)
    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    trained = [value for value in net.parameters() if value.requires_grad]
    sizes = [value.to_local().numel() for value in trained]

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        joined = torch.cat([value.detach().to_local().flatten() for value in tensors])
        return nn.functional.pad(joined, (0, -len(joined) % 64))

    copy = nn.Parameter(flat(trained))
    optimizer = torch.optim.AdamW([copy], lr=1e-2, fused=True)
    for update in range(UPDATES):
        loss_of(net, ranks, update, 0).backward()
        copy.grad = flat([value.grad for value in trained])
        for value in trained:  # not net.parameters(), which may be the gathered ones now
            value.grad = None
        optimizer.step()
        for module in parts:
            module.reshard()
        with torch.no_grad():
            new = copy[: sum(sizes)].split(sizes)
            for value, part in zip(trained, new, strict=True):
                value.to_local().copy_(part.view_as(value.to_local()))
    names = {value: name for name, value in net.named_parameters()}
    return {f"parameter.{names[value]}": whole(value) for value in trained}


@pytest.mark.parametrize("resident", [True, False])
def test_an_arena_changes_no_bit_of_fsdp2(resident):
    plain = run_ranks(2, train_outside_an_arena, resident)[0]
    _, state = run_ranks(2, train_in_arena, resident, 1, None)[0]
    assert all(torch.equal(state[name], value) for name, value in plain.items())


def train_without_hooks(ranks: Ranks, resident: bool, accumulation: int):
    """What a torch without ``set_custom_reduce_scatter`` would do."""
    del FSDPModule.set_custom_reduce_scatter
    return train_in_arena(ranks, resident, accumulation, attached=False)


@pytest.mark.parametrize("resident", [True, False])
def test_without_fsdp2s_hooks_the_arena_copies_and_changes_no_bit(resident):
    _, expected = run_ranks(2, train_in_arena, resident, 1)[0]
    _, state = run_ranks(2, train_without_hooks, resident, 1)[0]
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def shown_average(ranks: Ranks, resident: bool) -> list[Tensor]:
    """Outputs with the weights, with their average, and with the weights again."""
    net, x = network(), samples(0, 0)
    shard(net, ranks.mesh(), resident=resident, largest_unit=130)
    arena = ShardedArena(net, prefetch=resident, averages=1)
    arena.ranges["ema_0"].mul_(0.5)
    outputs = []
    with torch.no_grad():
        outputs.append(net(x))
        with arena.showing("ema_0"):
            outputs.append(net(x))
        outputs.append(net(x))
    return outputs


@pytest.mark.parametrize("resident", [True, False])
def test_averages_are_shown_for_sampling_and_taken_away(resident):
    own, halved = network(), network()
    with torch.no_grad():
        for value in halved.parameters():
            value.mul_(0.5 if value.requires_grad else 1.0)
        expected = [net(samples(0, 0)) for net in (own, halved, own)]
    for outputs in run_ranks(2, shown_average, resident):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def train_in_bfloat16(ranks: Ranks, resident: bool) -> tuple[set, list[float]]:
    """Dtypes of gathered weights, and losses."""
    net = network()
    shard(net, ranks.mesh(), resident=resident, compute_dtype=torch.bfloat16, largest_unit=130)
    arena = ShardedArena(net, prefetch=resident)
    optimizer = ArenaAdamW(arena, lr=1e-2)
    seen, losses = set(), []
    net.enter.register_forward_pre_hook(lambda module, *_: seen.add(module.weight.dtype))
    for _ in range(20):
        loss = net(samples(0, 0).bfloat16()).float().square().mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad(), arena.publish()
        losses.append(loss.item())
    assert all(flat.dtype == torch.float32 for flat in arena.ranges.values())
    return seen, losses


@pytest.mark.parametrize("resident", [True, False])
def test_bfloat16_weights_are_gathered_from_float32_shards(resident):
    for seen, losses in run_ranks(2, train_in_bfloat16, resident):
        assert seen == {torch.bfloat16}
        assert losses[-1] < 0.5 * losses[0]


def refused(ranks: Ranks) -> str:
    with pytest.raises(ValueError, match="is not sharded") as error:
        ShardedArena(network())
    return str(error.value)


def test_a_network_that_is_not_sharded_is_refused():
    assert "apply fastdistill.parallel.shard" in run_ranks(2, refused)[0]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 3, padding=1)
        self.frozen = nn.Conv2d(6, 6, 3, padding=1).requires_grad_(False)
        self.leave = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.frozen(torch.tanh(self.enter(x)))))


def convolve(ranks: Ranks, resident: bool) -> tuple[dict[str, Tensor], list, list]:
    """Weights after some updates; strides that the convolutions saw; shapes in the state dict."""
    torch.manual_seed(0)
    net = Convolutions().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x = images.to(memory_format=torch.channels_last).chunk(ranks.size)[ranks.rank]
    if ranks.size == 1:
        arena: Arena = Arena(net)
    else:
        shard(net, ranks.mesh(), resident=resident, largest_unit=300)
        arena = ShardedArena(net, prefetch=resident)
    strides = []
    convolution = torch.nn.functional.conv2d

    def seen(value: Tensor, weight: Tensor, *rest):
        strides.append(weight.stride())
        return convolution(value, weight, *rest)

    torch.nn.functional.conv2d = torch.nn.modules.conv.F.conv2d = seen
    optimizer = ArenaAdamW(arena, lr=1e-2)
    for _ in range(4):
        net(x).square().mean().backward()
        optimizer.step(), optimizer.zero_grad(), arena.publish()
    torch.nn.functional.conv2d = torch.nn.modules.conv.F.conv2d = convolution
    state = {name: whole(value) for name, value in arena.named(arena.ranges["parameter"]).items()}
    shapes = [tuple(value.shape) for value in net.state_dict().values()]
    return state, strides, shapes


@pytest.mark.parametrize("resident", [True, False])
def test_channels_last_convolutions_are_sharded_and_stay_channels_last(resident):
    expected, strides, shapes = convolve(Ranks(), resident)
    assert strides[:2] == [(27, 1, 9, 3), (54, 1, 18, 6)]
    for state, seen, found in run_ranks(2, convolve, resident):
        assert seen == strides
        assert found == shapes
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


def begin_differently(ranks: Ranks) -> str:
    net = network()
    if ranks.rank == 1:
        net.blocks[1].norm.bias.data[3] += 1e-7
    with pytest.raises(ValueError, match="rank 1 has other weights") as error:
        Parallel(ranks, "resident").arena(net, "student")
    return str(error.value)


def test_ranks_that_begin_with_different_weights_are_told():
    for message in run_ranks(2, begin_differently):
        assert "in 1 tensors, as blocks.1.norm.bias" in message
