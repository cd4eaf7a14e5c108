"""Checkpoints of several ranks: any mesh saves, any other loads, and a lost rank costs nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import RunningRanks, run_ranks
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastdistill.engine import checkpoint
from fastdistill.engine.checkpoint import CheckpointStore
from fastdistill.engine.shards import load_, read_tensors
from fastdistill.parallel import Ranks

STAGES = ("distill",)
LAYOUTS = {1: ("plain", "rows"), 2: ("plain", "rows"), 4: ("rows", "hsdp", "columns")}


def whole():
    """A state in which four ranks share rows unevenly, and some own none."""
    generator = torch.Generator().manual_seed(1)
    return {
        "networks": {
            "weight": torch.randn(10, 3, generator=generator),
            "bias": torch.randn(3, generator=generator),
            "half": torch.randn(7, 5, generator=generator).bfloat16(),
            "none": torch.zeros(0, 3),
        },
        "optimizer-student": {
            "moment": torch.arange(9, dtype=torch.uint8),
            "steps": torch.tensor([1, 2**40]),
            "exp_avg": torch.full((1, 4), float("nan")),
        },
    }


def placed(ranks, layout, states):
    """The states as a run of that layout holds them, beside tensors that are never sharded."""

    def place(tensor):
        if layout == "plain":
            return tensor.clone()
        dimension = 1 if layout == "columns" and tensor.dim() > 1 else 0
        mesh = ranks.mesh(2 if layout == "hsdp" else None)
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(dimension)]
        return distribute_tensor(tensor, mesh, placements)

    metrics = {f"loss/{k}": torch.full((2,), float(k)) for k in range(5)}
    groups = {
        group: {name: place(value) for name, value in state.items()}
        for group, state in states.items()
    }
    return groups | {"metrics": metrics | {"count": torch.tensor(5)}}


def bits(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist())


def all_bits(groups):
    return {
        (group, name): bits(value)
        for group, state in groups.items()
        for name, value in state.items()
    }


def save_layouts(ranks, folder):
    for layout in LAYOUTS[ranks.size]:
        store = CheckpointStore(folder / f"{ranks.size}-{layout}", STAGES, 2, ranks=ranks)
        store.save("distill", 7, placed(ranks, layout, whole()), {"state": {"step": 7}}, wait=True)


def load_layouts(ranks, folder):
    """The names that did not come back bit for bit, from each folder into each layout."""
    expected = all_bits(placed(ranks, "plain", whole()))
    wrong = []
    for saved in sorted(folder.iterdir()):
        found = CheckpointStore(saved, STAGES, 2, ranks=ranks).newest()
        for layout in LAYOUTS[ranks.size]:
            target = placed(ranks, layout, whole())
            for state in target.values():
                for value in state.values():
                    value.fill_(1)
            load_(found.path, target)
            got = all_bits(target)
            wrong += [(saved.name, layout, key) for key in expected if got[key] != expected[key]]
    return wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of one state, saved by 1, 2 and 4 ranks in every layout, and by one alone."""
    folder = tmp_path_factory.mktemp("saved")
    for size in LAYOUTS:
        run_ranks(size, save_layouts, folder)
    alone = CheckpointStore(folder / "alone", STAGES, 2)
    alone.save("distill", 7, placed(Ranks(), "plain", whole()), {"state": {"step": 7}}, wait=True)
    return folder


@pytest.mark.parametrize("size", LAYOUTS)
def test_what_any_mesh_saved_any_other_loads_bit_for_bit(saved, size):
    assert len(list(saved.iterdir())) == 8
    for wrong in run_ranks(size, load_layouts, saved):
        assert not wrong


def test_one_process_alone_reads_whole_tensors(saved):
    expected = all_bits(placed(Ranks(), "plain", whole()))
    for folder in saved.iterdir():
        path = folder / "distill-000000007"
        read = {group: read_tensors(path, group) for group in (*whole(), "metrics")}
        assert all_bits(read) == expected, folder


@pytest.mark.parametrize("name", ["4-hsdp", "4-rows", "2-plain"])
def test_equal_pieces_are_written_once_and_by_ranks_in_turn(saved, name):
    written, bytes_by_rank = [], []
    for file in sorted((saved / name).glob("distill-*/shard-*")):
        with safe_open(file, "pt") as shard:
            layout = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
            sizes = {key: shard.get_tensor(key).nbytes for key in layout}
        written += [(key, *layout[key]["saved_offsets"]) for key in sizes if sizes[key]]
        bytes_by_rank.append(sum(sizes.values()))
    assert len(bytes_by_rank) == int(name[0])
    assert len(set(written)) == len(written)
    assert min(bytes_by_rank) > 0.25 * max(bytes_by_rank)


def save_a_partial(ranks, folder):
    store = CheckpointStore(folder, STAGES, 2, ranks=ranks)
    tensor = DTensor.from_local(torch.ones(2), ranks.mesh(), [Partial()])
    with pytest.raises(ValueError, match="g/x is placed as Partial"):
        store.save("distill", 1, {"g": {"x": tensor}}, {})


def test_a_sum_that_is_not_yet_made_is_refused(tmp_path):
    run_ranks(2, save_a_partial, tmp_path)


def save_with_a_full_disk(ranks, folder, real):
    """What saving says where rank 1 cannot write, and what it leaves."""
    store = CheckpointStore(folder, STAGES, 2, ranks=ranks)
    tensors = {"g": {"x": torch.zeros(1000), "y": torch.zeros(1000)}}
    store.save("distill", 1, tensors, {})
    store.wait()
    write, limits = checkpoint.write_shard, resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1 and real:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    elif ranks.rank == 1:
        checkpoint.write_shard = _no_space
    store.save("distill", 2, tensors, {})
    with pytest.raises(OSError, match=r"No space left|File too large") as caught:
        store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoint.write_shard = write
    ranks.barrier()
    left = sorted(path.name for path in folder.iterdir())
    ranks.barrier()
    store.save("distill", 3, tensors, {})
    return caught.value.errno, str(caught.value), left, store.newest().step


def _no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("real", [False, True])
def test_a_full_disk_of_one_rank_is_an_error_on_all_and_leaves_nothing(tmp_path, real):
    for rank, (number, said, left, newest) in enumerate(
        run_ranks(2, save_with_a_full_disk, tmp_path, real)
    ):
        assert number == (errno.EFBIG if real else errno.ENOSPC)
        assert rank == 1 or "rank 1: " in said
        assert left == ["distill-000000001", "latest"]
        assert newest == 3


def find_newest(ranks, folder):
    said: list[str] = []
    found = CheckpointStore(folder, STAGES, 9, said.append, ranks).newest()
    return found, said


def save_three(ranks, folder):
    store = CheckpointStore(folder, STAGES, 9, ranks=ranks)
    for step in (1, 2, 3):
        store.save("distill", step, placed(ranks, "rows", whole()), {"state": {"step": step}})
    store.wait()


def test_damaged_shards_are_named_once_and_all_ranks_take_the_same_checkpoint(tmp_path):
    run_ranks(2, save_three, tmp_path)
    flipped = tmp_path / "distill-000000003" / "shard-00001-of-00002.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-3] ^= 16
    flipped.write_bytes(content)
    truncated = tmp_path / "distill-000000002" / "shard-00000-of-00002.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (first, said), (second, nothing) = run_ranks(2, find_newest, tmp_path)
    assert first == second
    assert first.step == 1
    assert nothing == []
    assert len(said) == 2
    assert "distill-000000003" in said[0]
    assert "shard-00001-of-00002.safetensors was altered" in said[0]
    assert "shard-00000-of-00002.safetensors has" in said[1]


POINTS = ("write_shard", "write_manifest", "replace_folder", "replace_link", "remove_folders")


def die_at(ranks, folder, point, before):
    """Save steps 1 to 3; during the last, be killed right before or after one of its acts."""
    store = CheckpointStore(folder, STAGES, 2, ranks=ranks)
    for step in (1, 2):
        store.save("distill", step, state_of(step), {}, wait=True)
    act = getattr(checkpoint, point)

    def die(*args):
        if not before:
            act(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(checkpoint, point, die)
    store.save("distill", 3, state_of(3), {}, wait=True)


def state_of(step):
    return {"networks": {f"layer{k}": torch.full((300, 400), float(step)) for k in range(4)}}


def check_intact(folder):
    """The newest checkpoint is whole, loads, and is of one step; ``latest`` points to one."""
    said: list[str] = []
    found = CheckpointStore(folder, STAGES, 2, said.append).newest()
    assert not said
    read = read_tensors(found.path, "networks")
    assert len(read) == 4
    for value in read.values():
        assert torch.equal(value, torch.full((300, 400), float(found.step)))
    assert (folder / "latest" / "manifest.json").exists()
    return found.step


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_a_commit_leaves_an_intact_checkpoint(tmp_path, point, before):
    [outcome] = RunningRanks(1, die_at, tmp_path, point, before).outcomes(60)
    assert outcome.error == "ended with exit code -9"
    renamed = POINTS.index(point) + (not before) > POINTS.index("replace_folder")
    assert check_intact(tmp_path) == (3 if renamed else 2)
    CheckpointStore(tmp_path, STAGES, 2).save("distill", 4, state_of(4), {}, wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"distill-{3 if renamed else 2:09d}",
        "distill-000000004",
        "latest",
    ]


def save_forever(ranks, folder):
    """Go on from the newest checkpoint, saving all the time."""
    store = CheckpointStore(folder, STAGES, 2, ranks=ranks)
    newest = store.newest()
    step = newest.step if newest else 0
    while True:
        step += 1
        state = state_of(step)
        with ranks.watching():
            state["networks"]["layer0"] = distribute_tensor(
                state["networks"]["layer0"], ranks.mesh(), [Shard(0)]
            )
        store.save("distill", step, state, {"state": {"step": step}})


@pytest.mark.slow
def test_kills_at_random_moments_leave_an_intact_checkpoint(tmp_path):
    generator, step = random.Random(2), 0
    for _ in range(4):
        running = RunningRanks(2, save_forever, tmp_path)
        deadline = time.monotonic() + 60
        while _newest_name(tmp_path) <= f"distill-{step:09d}" and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.2))
        lost = generator.randrange(2)
        running.signal(lost, signal.SIGKILL)
        outcomes = running.outcomes(10)
        assert "RankLostError" in outcomes[1 - lost].error, outcomes[1 - lost].error
        found = check_intact(tmp_path)
        assert found > step
        step = found


def _newest_name(folder: Path) -> str:
    return max((path.name for path in folder.glob("distill-*")), default="")
