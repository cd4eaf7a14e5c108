"""The arena's optimizer on a GPU: torch's numbers, two kernels, no wait; FSDP2 in it under nccl.

TRITON_INTERPRET=0 python -m pytest -m device tests/device
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor, nn

from fastdistill.ops import use_backend
from fastdistill.optim import ArenaAdamW

REHEARSAL = os.environ.get("FASTDISTILL_DEVICE_TESTS") == "cpu"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not REHEARSAL and not torch.cuda.is_available(), reason="no GPU"),
]
on_gpu = pytest.mark.skipif(REHEARSAL, reason="only a GPU has launches and streams to look at")


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 64, 5)]
    net = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return net.to(DEVICE, dtype)


def backward(net: nn.Module, update: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(update)
    x = torch.randn(4, 3, 8, 8, generator=generator).to(DEVICE, dtype)
    net(x).float().square().mean().backward()


def gradients(net: nn.Module) -> list[Tensor]:
    return [value.grad for value in net.parameters() if value.grad is not None]


def test_updates_are_torchs():
    ours, theirs = network(torch.float32), network(torch.float32)
    mine = ArenaAdamW(ours.parameters(), lr=1e-2, max_norm=0.5)
    fused = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    for update in range(5):
        backward(theirs, update, torch.float32)
        for value, gradient in zip(ours.parameters(), gradients(theirs), strict=True):
            value.grad.copy_(gradient)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        mine.step(), fused.step()
        fused.zero_grad(), mine.zero_grad()
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-5, atol=0.0)
    for value, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_low_precision_training_repeats_bit_by_bit(moments):
    ends = []
    for _ in range(2):
        net = network(torch.bfloat16)
        options = {"moments": moments, "stochastic_rounding": True, "ema_decays": [0.9]}
        optimizer = ArenaAdamW(net.parameters(), lr=1e-2, **options)
        for update in range(5):
            optimizer.zero_grad()
            backward(net, update, torch.bfloat16)
            optimizer.step()
        ends.append(copy.deepcopy(optimizer.arena.ranges))
    assert all(torch.equal(ends[0][role], ends[1][role]) for role in ends[0])


@on_gpu
def test_an_update_is_two_kernels_and_never_waits():
    net = network(torch.bfloat16)
    optimizer = ArenaAdamW(net.parameters(), lr=1e-2, max_norm=1.0, ema_decays=[0.9])
    for update in range(2):
        backward(net, update, torch.bfloat16)
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(names) == 2, names


@on_gpu
def test_fsdp2_in_an_arena_under_nccl(tmp_path):
    """One rank: FSDP2's streams, hooks and memory, with nothing to exchange."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from fastdistill.parallel import ShardedArena, shard

    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 's'}", rank=0, world_size=1)
    try:
        sharded, plain = network(torch.float32), network(torch.float32)
        shard(sharded, init_device_mesh("cuda", (1,)), resident=True, largest_unit=300)
        arena = ShardedArena(sharded, prefetch=True)
        assert arena.attached
        mine, theirs = ArenaAdamW(arena, lr=1e-2), ArenaAdamW(plain.parameters(), lr=1e-2)
        for update in range(5):
            backward(sharded, update, torch.float32)
            backward(plain, update, torch.float32)
            mine.step(), theirs.step()
            mine.zero_grad(), theirs.zero_grad()
            arena.publish()
        masters = arena.whole("parameter").values()
        for value, wanted in zip(masters, plain.parameters(), strict=True):
            torch.testing.assert_close(value, wanted.cpu(), rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()
