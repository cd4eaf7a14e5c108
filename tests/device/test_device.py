"""The Triton kernels on a GPU: what the interpreter and the compiler cannot show.

    TRITON_INTERPRET=0 python -m pytest -m device tests/device

Real rounding, races, large offsets, streams, graph capture and host synchronisation. Without a GPU
the tests are skipped, unless FASTDISTILL_DEVICE_TESTS=cpu runs those that can on small tensors in
the interpreter, which proves the tests themselves.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from calls import calls, in_dtype, map_tensors, outcome

from fastdistill.ops import (
    Coefficients,
    Distance,
    adamw_ema_,
    denoising_cotangent,
    matching_cotangent,
    normal,
    projection_cotangents,
    quantise_moment,
    renoise,
    sum_of_squares,
    use_backend,
)

REHEARSAL = os.environ.get("FASTDISTILL_DEVICE_TESTS") == "cpu"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not REHEARSAL and not torch.cuda.is_available(), reason="no GPU"),
]
on_gpu = pytest.mark.skipif(REHEARSAL, reason="only a GPU has streams, graphs and much memory")

SHAPES = (
    [(2, 4, 4)]
    if REHEARSAL
    else [(1,), (2, 4, 4), (3, 5, 7), (3, 32, 32), (4, 64, 64), (4, 128, 128), (4, 512, 1024)]
)
STORAGE = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]
OPS = list(calls())
by_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@pytest.fixture(autouse=True)
def triton():
    """Every op of the test runs its Triton kernel; memory is given back afterwards."""
    with use_backend("triton"):
        yield
    gc.collect()
    if not REHEARSAL:
        torch.cuda.empty_cache()


def to_device(args):
    return map_tensors(lambda value: value.to(DEVICE), args)


@by_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_error_is_at_most_twice_torchs(op, shape, storage):
    """Against float64; plain torch is the reference in float32, rounded to the results' dtypes."""
    args = calls(2, shape, *storage)[op]
    with use_backend("reference"):
        exact = outcome(op, op, in_dtype(args, torch.float64))
        plain = outcome(op, op, map_tensors(torch.clone, args))
    found = outcome(op, op, to_device(args))
    for mine, torchs, truth in zip(found, plain, exact, strict=True):
        assert (mine.dtype, mine.shape) == (torchs.dtype, torchs.shape)
        if truth.numel() == 0:
            continue
        # The interpreter truncates bfloat16, and tensor cores sum in another order.
        places = 2 if REHEARSAL else 1
        place = places * torch.finfo(mine.dtype).eps * truth.abs().max() + 1e-6 * truth.abs().max()
        bound = 2 * (torchs.double() - truth).abs().max() + place
        assert (mine.cpu().double() - truth).abs().max() <= bound


@by_op
def test_results_repeat_bit_by_bit(op):
    """No race, no atomic order: twenty runs, with other work beside them, give the same bits."""
    first = None
    for _ in range(2 if REHEARSAL else 20):
        args = to_device(calls(4, SHAPES[-1] if op.name != "mixture_denoise" else (64,))[op])
        if not REHEARSAL:
            torch.randn(2048, 2048, device=DEVICE).mm(torch.randn(2048, 2048, device=DEVICE))
        found = outcome(op, op, args)
        first = found if first is None else first
        for mine, expected in zip(found, first, strict=True):
            assert torch.equal(mine, expected)


@by_op
def test_uninitialised_memory_does_not_show(op):
    """`tests/conftest.py` fills new memory with NaN: every result is written."""
    for value in outcome(op, op, to_device(calls(3, SHAPES[1 % len(SHAPES)])[op])):
        assert value.isfinite().all()


@by_op
def test_a_batch_of_none_launches_nothing(op):
    args = calls(1, (2, 4, 4))[op]
    empty = map_tensors(lambda v: v[:0] if v.ndim and v.shape[0] == 1 else v, args)
    if op.name in ("adamw_ema_", "sum_of_squares", "density_ratio_weight"):
        pytest.skip("has no batch")
    for value in outcome(op, op, to_device(empty)):
        assert value.shape[0] == 0


def test_noise_is_the_cpus():
    shape = (3, 1000)
    key, index = torch.tensor([2**40, 7, 1]), torch.arange(3) + 2**31
    on_device = normal(key.to(DEVICE), index.to(DEVICE), shape)
    with use_backend("reference"):
        truth = normal(key, index, shape, torch.float64)
    assert (on_device.cpu().double() - truth).abs().max() < 1e-6


@on_gpu
@by_op
def test_no_op_waits_for_the_device(op):
    args = to_device(calls(4, (4, 64, 64))[op])
    op(*args)  # compiles, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@by_op
def test_a_captured_graph_replays_on_new_input(op):
    args = to_device(calls(4, (4, 64, 64))[op])
    fresh = map_tensors(lambda v: v * 0.75 if v.is_floating_point() else v + 1, args)
    if op.name == "density_ratio_weight":  # indices of bins stay within the bins
        fresh = (*fresh[:1], args[1], *fresh[2:])
    if op.name == "adamw_ema_":  # its ticket stays 0
        fresh = (*fresh[:9], args[9].clone(), *fresh[10:])
    expected = outcome(op, op, map_tensors(torch.clone, fresh))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        op(*map_tensors(torch.clone, args))
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = outcome(op, op, args)
    map_pairs(args, fresh)
    graph.replay()
    torch.cuda.synchronize()
    for mine, theirs in zip(results, expected, strict=True):
        assert torch.equal(mine, theirs)


def map_pairs(args, fresh) -> None:
    """Write the new values into the memory that was captured."""
    old, new = (torch.utils._pytree.tree_leaves(value) for value in (args, fresh))
    for one, other in zip(old, new, strict=True):
        if isinstance(one, Tensor):
            one.copy_(other)


@on_gpu
@pytest.mark.skipif(
    not REHEARSAL and torch.cuda.is_available() and torch.cuda.device_count() < 2,
    reason="one GPU",
)
def test_kernels_launch_on_the_device_of_their_tensors():
    for op in OPS:
        args = map_tensors(lambda value: value.to("cuda:1"), calls()[op])
        for value in outcome(op, op, args):
            assert value.device.index == 1


@on_gpu
@pytest.mark.slow
def test_a_compiled_function_has_the_eager_gradient():
    def loss(x0, x_t, teacher, critic, a, b):
        pair = Coefficients(a, b)
        return projection_cotangents(
            x0, x_t, teacher.sin(), pair, critic, pair, distance=Distance.pseudo_huber(0.1)
        ).loss.sum()

    x = [torch.randn(4, 4, 64, 64, device=DEVICE, requires_grad=True) for _ in range(4)]
    a, b = torch.rand(2, 4, device=DEVICE) + 0.3
    eager = torch.autograd.grad(loss(*x, a, b), x)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*x, a, b), x)
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def shard(size: int, device: torch.device, ranges: int, coded: bool):
    """State of an update, and a call of it: many ranges, a copy, both kinds of rounding."""
    generator = torch.Generator().manual_seed(0)
    p, g, m, v, ema = torch.randn(5, size, generator=generator).unbind()
    state = {"parameter": p, "gradient": g.bfloat16(), "exp_avg": m, "exp_avg_sq": v.square()}
    if coded:
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            found = quantise_moment(state[name], signed=signed)
            state[name], state[f"{name}_scale"] = found
        state["moment_key"] = torch.tensor([4, 5, 6])
    state |= {"step": torch.zeros(()), "counters": torch.zeros(2, dtype=torch.int32)}
    state |= {"copy": torch.zeros(size, dtype=torch.bfloat16), "key": torch.tensor([1, 2, 3])}
    state = {name: value.to(device) for name, value in state.items()}
    ema = ema.to(device)
    cuts = torch.randint(1, size, (ranges - 1,), generator=generator).tolist()
    starts = [0, *sorted(set(cuts))]

    def update(squared_norm: Tensor) -> None:
        adamw_ema_(
            **state,
            squared_norm=squared_norm,
            max_norm=1.0,
            emas=[ema],
            ema_decays=[0.9],
            lr=[0.1, 0.2, 0.3],
            weight_decay=[0.0, 0.1, 0.2],
            starts=starts,
            groups=[k % 3 for k in range(len(starts))],
        )

    return state | {"ema": ema}, update


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("ranges", [1, 200])
@pytest.mark.parametrize("size", [5008] if REHEARSAL else [5008, 2**22 + 16, 2**22 + 5])
def test_a_shard_is_updated_as_on_the_cpu(size, ranges, coded):
    """Codes may differ by one where a last place decides the rounding."""
    ours, update = shard(size, DEVICE, ranges, coded)
    theirs, reference = shard(size, torch.device("cpu"), ranges, coded)
    update(sum_of_squares(ours["gradient"]))
    with use_backend("reference"):
        reference(sum_of_squares(theirs["gradient"]))
    for name, value in ours.items():
        mine, truth = value.cpu(), theirs[name]
        if mine.dtype == torch.uint8:
            assert (mine != truth).double().mean() < 1e-3
            assert (mine.int() - truth.int()).abs().max() <= 1
        else:
            place = 2.0**-7 if mine.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(mine, truth, rtol=place, atol=1e-6)


def test_the_last_program_counts_and_resets_its_ticket():
    """Hundreds of launches of thousands of programs behind each other, every third one skipped."""
    size, updates = (5008, 6) if REHEARSAL else (2**23, 600)
    state, update = shard(size, DEVICE, 1, False)
    norms = [torch.tensor(value, device=DEVICE) for value in (1.0, 2.0, float("nan"))]
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    first = sum_of_squares(state["gradient"], ticket=ticket)
    for k in range(updates):
        update(norms[k % 3])
        assert (
            REHEARSAL
            or k % 50
            or torch.equal(sum_of_squares(state["gradient"], ticket=ticket), first)
        )
    assert state["counters"].tolist() == [updates // 3, 0]
    assert state["step"] == updates - updates // 3
    assert ticket == 0


LARGE = 2**31 + 2**21  # elements: past 32-bit offsets


@on_gpu
@pytest.mark.slow
class TestPastTwoToThe31:
    """bfloat16 tensors of 4.3 GB: the last samples must be what they are alone."""

    rows, elements = LARGE // 2**20, 2**20

    def rows_of(self, seed: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        value = torch.empty(self.rows, self.elements, dtype=torch.bfloat16, device=DEVICE)
        return value.normal_(generator=generator)

    def numbers(self, count: int) -> list[Tensor]:
        return list(torch.rand(count, self.rows, device=DEVICE) + 0.3)

    def check(self, run, *tensors: Tensor) -> None:
        """``run`` on all rows gives for the last two what it gives on them alone."""
        whole = run(*tensors)
        alone = run(*(value[-2:] for value in tensors))
        for mine, theirs in zip(whole, alone, strict=True):
            assert torch.equal(mine[-2:], theirs)

    def test_denoising(self):
        self.check(
            lambda f, x, x_t, a, b, w: denoising_cotangent(f, x, x_t, Coefficients(a, b), w),
            *(self.rows_of(seed) for seed in range(3)),
            *self.numbers(3),
        )

    def test_renoise(self):
        key, index = torch.tensor([1, 2, 3], device=DEVICE), torch.arange(self.rows, device=DEVICE)
        self.check(
            lambda x, a, b, i: (renoise(x, a, b, key, i).x_t,),
            self.rows_of(0),
            *self.numbers(2),
            index,
        )

    def test_matching(self):
        def run(x, x_t, teacher, critic, a, b):
            pair = Coefficients(a, b)
            return matching_cotangent(x, x_t, teacher, pair, critic, pair)[:2]

        self.check(run, *(self.rows_of(seed) for seed in range(4)), *self.numbers(2))

    def test_projection(self):
        def run(x, x_t, teacher, critic, a, b):
            pair = Coefficients(a, b)
            result = projection_cotangents(x, x_t, teacher, pair, critic, pair)
            return result.x0, result.x_t, result.teacher, result.critic, result.loss

        self.check(run, *(self.rows_of(seed) for seed in range(4)), *self.numbers(2))

    def test_sum_of_squares(self):
        value = torch.zeros(LARGE, dtype=torch.bfloat16, device=DEVICE)
        value[-3:] = 2.0
        assert sum_of_squares(value).item() == 12.0

    def test_adamw(self):
        state = [torch.zeros(LARGE, device=DEVICE) for _ in range(3)]
        gradient = torch.ones(LARGE, dtype=torch.bfloat16, device=DEVICE)
        copy = torch.zeros(LARGE, dtype=torch.bfloat16, device=DEVICE)
        step = torch.zeros((), device=DEVICE)
        starts = [0, 2**31 + 7, LARGE - 5]
        adamw_ema_(
            *(state[0], gradient, *state[1:], step),
            lr=[0.5, 0.25],
            weight_decay=0.0,
            starts=starts,
            groups=[0, 0, 1],
            copy=copy,
        )
        ends = torch.cat((copy[:4], copy[LARGE // 2 :][:4], copy[-8:])).float()
        assert ends.tolist() == [-0.5] * 11 + [-0.25] * 5
