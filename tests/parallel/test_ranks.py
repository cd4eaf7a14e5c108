"""Ranks exchange what they should, and end with a clear message when one of them is lost."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from processes import RunningRanks, run_ranks
from torch.distributed.tensor import Shard, distribute_tensor

from fastdistill.parallel import RankLostError, Ranks

PATIENCE = 4.0  # seconds for one exchange, where a rank stops or sleeps
LIMIT = 10.0  # seconds in which all others have ended


def test_one_process_alone_is_the_identity():
    ranks, tensor = Ranks(), torch.arange(3.0)
    assert (ranks.rank, ranks.size, ranks.is_first, ranks.local_rank) == (0, 1, True, 0)
    assert ranks.group is None
    assert ranks.control is None
    assert ranks.gather(tensor) is tensor
    ranks.sum_(tensor)
    assert torch.equal(tensor, torch.arange(3.0))
    assert ranks.gather_objects("x") == ["x"]
    assert ranks.broadcast_object("x") == "x"
    assert ranks.any(True)
    assert not ranks.any(False)
    ranks.barrier()
    ranks.close()
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="torchrun"):
        ranks.mesh()


def test_without_torchrun_a_run_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert Ranks.start("cpu").group is None


def test_alone_an_error_of_torch_stays_what_it_is():
    with pytest.raises(RuntimeError, match="Timed out") as caught, Ranks().watching():
        raise RuntimeError("Timed out waiting")
    assert not isinstance(caught.value, RankLostError)


def exchange(ranks):
    tensor = torch.full((2, 3), float(ranks.rank))
    gathered = ranks.gather(tensor)
    ranks.sum_(tensor)
    with pytest.raises(ValueError, match="cannot be split"):
        ranks.mesh(3)
    thread = ranks.for_thread()
    return {
        "gathered": gathered[:, 0].tolist(),
        "bfloat16": ranks.gather(torch.ones(1, dtype=torch.bfloat16)).tolist(),
        "sum": tensor[0, 0].item(),
        "objects": ranks.gather_objects({"rank": ranks.rank}),
        "broadcast": ranks.broadcast_object(ranks.rank, source=1),
        "any": (ranks.any(ranks.rank == 1), ranks.any(False)),
        "thread": thread.control is not ranks.control and thread.gather_objects(ranks.rank),
        "mesh": (ranks.mesh().mesh_dim_names, ranks.mesh().mesh.tolist()),
        "hsdp": (ranks.mesh(2).mesh_dim_names, ranks.mesh(2).mesh.tolist()),
        "cached": ranks.mesh() is ranks.mesh(4) and ranks.mesh(2) is ranks.mesh(2),
        "whole": distribute_tensor(torch.arange(5), ranks.mesh(), [Shard(0)])
        .full_tensor()
        .tolist(),
    }


def test_four_ranks_exchange():
    for found in run_ranks(4, exchange):
        assert found["gathered"] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert found["bfloat16"] == [1, 1, 1, 1]
        assert found["sum"] == 6
        assert found["objects"] == [{"rank": rank} for rank in range(4)]
        assert found["broadcast"] == 1
        assert found["any"] == (True, False)
        assert found["thread"] == [0, 1, 2, 3]
        assert found["mesh"] == (("shard",), [0, 1, 2, 3])
        assert found["hsdp"] == (("replicate", "shard"), [[0, 1], [2, 3]])
        assert found["cached"]
        assert found["whole"] == [0, 1, 2, 3, 4]


def abort(ranks, folder, times):
    marks = folder / f"{ranks.rank}"
    done = len(marks.read_text()) if marks.exists() else 0
    if ranks.rank == 1 and done < times:
        marks.write_text("x" * (done + 1))
        os.abort()
    ranks.barrier()
    return done


def test_ranks_that_abort_once_begin_anew_and_twice_fail(tmp_path):
    with pytest.warns(UserWarning, match="a rank of abort aborted"):
        assert run_ranks(2, abort, tmp_path, 1) == [0, 1]
    with (
        pytest.warns(UserWarning, match="began anew"),
        pytest.raises(AssertionError, match="rank 1: ended with exit code -6"),
    ):
        run_ranks(2, abort, tmp_path, 9)


def close(ranks):
    ranks.close()
    initialised = dist.is_initialized()
    ranks.control = None
    return initialised


def test_closing_leaves_no_process_group():
    assert run_ranks(1, close) == [False]


class Summed(torch.autograd.Function):
    """An exchange in the backward pass, as FSDP's."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def exchange_forever(ranks, kind, folder):
    """Exchanges of one kind, as the steps of a training make them."""
    tensor = torch.ones(1000)
    while True:
        if kind == "barrier":
            ranks.barrier()
        elif kind == "any":
            ranks.any(False)
        elif kind == "sum":
            ranks.sum_(tensor)
        elif kind == "mesh":
            with ranks.watching():
                for name in ("replicate", "shard"):
                    dist.all_reduce(tensor, group=ranks.mesh(2).get_group(name))
        elif kind == "backward":
            with ranks.watching():
                Summed.apply(tensor.requires_grad_()).sum().backward()
        (folder / str(ranks.rank)).touch()


def lose(folder, size, kind, lost, number, **options):
    """What the other ranks say after one got a signal, all of them within the limit."""
    patience = PATIENCE if number == signal.SIGSTOP else 60.0
    running = RunningRanks(size, exchange_forever, kind, folder, patience=patience, **options)
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < size and time.monotonic() < deadline:
        time.sleep(0.05)
    running.signal(lost, number)
    outcomes = running.outcomes(LIMIT, lost=lost)
    return [str(end.error).strip().splitlines()[-1] for k, end in enumerate(outcomes) if k != lost]


@pytest.mark.parametrize(
    ("size", "kind", "lost"),
    [(2, "backward", 1), (2, "barrier", 0), (4, "mesh", 2), (4, "any", 0)],
)
def test_a_killed_rank_ends_the_others_with_its_name(tmp_path, size, kind, lost):
    said = lose(tmp_path, size, kind, lost, signal.SIGKILL)
    for line in said:
        assert "RankLostError" in line, said
        assert f"rank {lost} did not answer" in line, said


@pytest.mark.parametrize(("size", "kind", "lost"), [(2, "sum", 0), (4, "barrier", 1)])
def test_a_stopped_rank_ends_the_others_with_its_name(tmp_path, size, kind, lost):
    said = lose(tmp_path, size, kind, lost, signal.SIGSTOP)
    for line in said:
        assert "RankLostError" in line, said
        assert f"rank {lost} did not answer" in line, said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_0_may_take_the_store_with_it(tmp_path, number):
    said = lose(tmp_path, 2, "sum", 0, number, own_store=True)
    assert "rank 0, which keeps the list of ranks, does not answer" in said[0], said


def come_too_late(ranks):
    if ranks.rank == 1:
        time.sleep(PATIENCE + 2)
    ranks.any(False)


def test_a_rank_that_lives_but_comes_too_late_is_not_called_dead():
    first, _ = RunningRanks(2, come_too_late, patience=PATIENCE).outcomes(LIMIT)
    assert "all ranks live, but one came later than 4 s" in first.error
