"""Two gloo processes: every op on a DTensor sharded over the batch gives one process' numbers."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))


def check_refusal(parameter, args) -> None:
    """An update takes one rank's range, never a whole DTensor, and a DTensor takes no ticket."""
    from fastdistill.ops import adamw_ema_, sum_of_squares

    with pytest.raises(ValueError, match="DTensor"):
        adamw_ema_(parameter, *args[1:5], lr=0.1)
    with pytest.raises(ValueError, match="takes no ticket"):
        sum_of_squares(parameter, ticket=torch.zeros(1, dtype=torch.int32))


def check(rank: int, store: str) -> None:
    from calls import calls
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from fastdistill.ops import density_ratio_weight
    from fastdistill.ops.adamw import _adamw_ema_
    from fastdistill.ops.gaussian import _gaussian_transport

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for op, args in calls(batch=4).items():
        if op is _adamw_ema_:
            check_refusal(distribute_tensor(args[0], mesh, [Shard(0)]), args)
            continue
        kept = range(len(args)) if op.replicated is None else op.replicated
        placed = [
            distribute_tensor(value, mesh, [Replicate() if k in kept else Shard(0)])
            if isinstance(value, torch.Tensor)
            else value
            for k, value in enumerate(args)
        ]
        single, sharded = op(*args), op(*placed)
        single = single if isinstance(single, tuple) else (single,)
        sharded = sharded if isinstance(sharded, tuple) else (sharded,)
        for mine, whole in zip(sharded, single, strict=True):
            # Sums in another order; vectors of torch's kernels that end elsewhere.
            if op.summed or not op.native_cpu or op is _gaussian_transport:
                torch.testing.assert_close(mine.full_tensor(), whole)
            else:
                assert torch.equal(mine.full_tensor(), whole), op.name

    generator = torch.Generator().manual_seed(3)
    logits, bins = torch.randn(8, 2, generator=generator), torch.arange(8) % 3
    mine = slice(4 * rank, 4 * rank + 4)
    history = torch.zeros(3, 2)
    whole = density_ratio_weight(logits, bins, history, power=1.0)
    part = density_ratio_weight(
        logits[mine], bins[mine], history, power=1.0, group=dist.group.WORLD
    )
    assert torch.equal(part.weight, whole.weight[mine])
    assert torch.equal(part.history, whole.history)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} done", flush=True)
    os._exit(0)  # without the interpreter's teardown, in which gloo's threads abort now and then


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(check, args=(f"{folder}/store",), nprocs=2)
