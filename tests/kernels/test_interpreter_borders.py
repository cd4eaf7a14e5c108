"""Kernels of whole-sample losses, mixtures and parameter ranges where sizes meet block borders.

`tests/ops` runs the same kernels on ordinary sizes; here are samples cut into many programs, tails,
groups that straddle blocks, and what is not finite in a part of a sample.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from calls import calls, in_dtype, map_tensors, outcome

from fastdistill.kernels import adamw, norm
from fastdistill.ops import Distance, adamw_ema_, sum_of_squares, use_backend
from fastdistill.ops.adamw import _stochastic_bfloat16
from fastdistill.ops.consistency import _consistency_cotangent
from fastdistill.ops.gaussian import _gaussian_transport
from fastdistill.ops.mixture import _mixture_denoise, _mixture_denoise_backward
from fastdistill.ops.projection import _projection_cotangents

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STORAGE = [(F32, F32), (F16, F16), (F32, BF16)]
SAMPLE_OPS = [_projection_cotangents, _consistency_cotangent]
DISTANCES = [Distance.squared_l2(), Distance.pseudo_huber(0.3), Distance.power(1.5), Distance.l1()]


def with_distance(op, args, distance):
    """The same call with another distance; its place is known by the arguments behind it."""
    place = 12 if op is _projection_cotangents else 9
    return (*args[:place], *distance, *args[place + 3 :])


def check(op, args, places: float = 8.0) -> tuple[torch.Tensor, ...]:
    """Each result within twice torch's error, and what the interpreter's truncation adds."""
    with use_backend("reference"):
        exact = outcome(op, op, in_dtype(args, torch.float64))
        plain = outcome(op, op, map_tensors(torch.clone, args))
    with use_backend("triton"):
        found = outcome(op, op, args)
    for mine, torchs, truth in zip(found, plain, exact, strict=True):
        assert (mine.dtype, mine.shape) == (torchs.dtype, torchs.shape)
        if truth.numel() == 0:
            continue
        place = places * torch.finfo(F32).eps + (2.0**-7 if mine.dtype == BF16 else 0.0)
        bound = 2 * (torchs.double() - truth).abs().max() + place * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= bound
    return found


@pytest.mark.parametrize("op", SAMPLE_OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("latent", "raw"), STORAGE, ids=str)
@pytest.mark.parametrize("elements", [1, 7, 1000, 16_384, 16_385, 32_768])
def test_samples_of_one_program_and_of_several(elements, latent, raw, op):
    batch = 2 if elements < 10_000 else 1
    check(op, calls(batch, (elements,), latent, raw)[op])


@pytest.mark.parametrize("op", SAMPLE_OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("distance", DISTANCES, ids=str)
def test_every_distance_of_a_split_sample(distance, op):
    check(op, with_distance(op, calls(2, (20_000,))[op], distance), places=64.0)


@pytest.mark.parametrize("place", [0, 19_999])
@pytest.mark.parametrize("distance", DISTANCES, ids=str)
def test_a_split_sample_that_is_not_finite_is_dropped_whole(distance, place):
    args = with_distance(
        _projection_cotangents, calls(2, (20_000,))[_projection_cotangents], distance
    )
    args[5][1, place] = math.nan
    with use_backend("triton"):
        *cotangents, statistics = _projection_cotangents(*args)
    assert statistics[:, 3].tolist() == [0, 1]
    for cotangent in cotangents:
        assert cotangent[1].abs().max() == 0
        assert cotangent[0].abs().max() > 0


@pytest.mark.slow
def test_a_sample_of_a_million_elements():
    check(_consistency_cotangent, calls(1, (2**20 + 3,))[_consistency_cotangent])


def test_coefficients_may_be_expanded_or_strided():
    args = list(calls(4, (100,))[_projection_cotangents])
    wide = torch.rand(4, 3) + 0.3
    for place, view in ((3, torch.tensor(0.7).expand(4)), (4, wide[:, 1]), (10, wide[:, 2])):
        args[place] = view
    check(_projection_cotangents, tuple(args))


@pytest.mark.parametrize(("d", "r", "batch"), [(130, 65, 3), (1000, 3, 17), (64, 64, 33)])
def test_transport_at_sizes_that_are_no_multiples_of_its_tiles(d, r, batch):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, r, generator=generator))[0].contiguous()
    x, mean = torch.randn(batch, d, generator=generator), torch.randn(d, generator=generator)
    numbers = [torch.rand(batch, generator=generator) for _ in range(5)]
    gains = [torch.rand(batch, r, generator=generator) for _ in range(2)]
    shift, one, rest, two, other = numbers
    check(_gaussian_transport, (x, mean, basis, shift, one, rest, gains[0], two, other, gains[1]))


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize(("components", "d"), [(1, 1), (3, 129), (70, 5), (5000, 2)])
def test_mixtures_of_few_and_of_many_components(components, d, isotropic):
    generator = torch.Generator().manual_seed(0)
    x, u = torch.randn(2, 2, d, generator=generator)
    alpha, sigma, grad = torch.rand(3, 2, generator=generator) + 0.4
    means = torch.randn(components, d, generator=generator) / d**0.5
    spread = torch.rand(components, 1 if isotropic else d, generator=generator)
    weights = torch.randn(components, generator=generator).log_softmax(0)
    _, _, posterior = check(
        _mixture_denoise, (x, alpha, sigma, means, spread, weights), places=64.0
    )
    backward = (x, alpha, sigma, means, spread, posterior, u, grad)
    with use_backend("triton"):
        found = _mixture_denoise_backward(*backward)
    exact = _mixture_denoise_backward.reference(*in_dtype(backward, torch.float64))
    assert (found - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-6


@pytest.mark.parametrize("size", [1, 15, 16, 1023, 1024, 1040, 2500])
def test_an_update_of_any_length(size):
    """Whole blocks, a masked last one, and a tail that is no multiple of 16."""
    state = [torch.rand(size) for _ in range(8)]
    results = []
    for backend in ("reference", "triton"):
        p, g, m, v, ema = (value.clone() for value in state[:5])
        copy, step = torch.zeros(size, dtype=BF16), torch.tensor(7.0)
        borders = sorted({0, size // 3, size // 2})
        with use_backend(backend):
            adamw_ema_(
                *(p, g, m, v, step),
                lr=[0.1 * (k + 1) for k in range(len(borders))],
                weight_decay=[0.1 / (k + 1) for k in range(len(borders))],
                starts=borders,
                emas=[ema],
                ema_decays=[0.9],
                copy=copy,
                key=torch.tensor([1, 2, 3]),
            )
        assert torch.equal(copy, _stochastic_bfloat16(p, torch.tensor([1, 2, 3])))
        results.append((p, m, v, ema, step))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)


@contextlib.contextmanager
def launches(monkeypatch) -> Iterator[list[str]]:
    """Names of what would be launched on a GPU: kernels, and every op of torch but allocations."""
    found: list[str] = []
    run = InterpretedFunction.run

    def counted(self, *args, **options):
        found.append(self.fn.__name__)
        with _disable_current_modes():
            return run(self, *args, **options)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "empty" not in str(function):
                found.append(str(function))
            return function(*args, **(kwargs or {}))

    with monkeypatch.context() as patch, Mode():
        patch.setattr(InterpretedFunction, "run", counted)
        yield found


@pytest.mark.parametrize("coded", [False, True])
def test_an_update_is_two_launches(coded, monkeypatch):
    """The norm and the update with every option, where the caller keeps ticket and counters."""
    size = 3 * 1024 + 16
    p, g, m, v, ema = torch.rand(5, size).unbind()
    counters, ticket = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    key, step = torch.tensor([1, 2, 3]), torch.zeros(())
    options = {"emas": [ema], "ema_decays": [0.9], "copy": torch.zeros(size, dtype=BF16)}
    options |= {"lr": [0.1, 0.2], "starts": [0, 70, 900], "groups": [1, 0, 1], "key": key}
    if coded:
        m, v = torch.zeros(2, size, dtype=torch.uint8).unbind()
        options["exp_avg_scale"], options["exp_avg_sq_scale"] = torch.zeros(2, 13).unbind()
        options["moment_key"] = key

    def update():
        norm = sum_of_squares(g, ticket=ticket)
        adamw_ema_(p, g, m, v, step, squared_norm=norm, max_norm=1.0, counters=counters, **options)

    with use_backend("triton"):
        update()  # copies the table of ranges
        with launches(monkeypatch) as found:
            update()
    assert found == ["_squares_kernel", "_adamw_kernel"]
    assert step == 2


def test_another_length_takes_one_launch_more(monkeypatch):
    values = torch.rand(4, 1029).unbind()
    with use_backend("triton"), launches(monkeypatch) as found:
        adamw_ema_(*values, torch.zeros(()), lr=0.1)
    assert found.count("_adamw_kernel") == 2


@pytest.mark.parametrize("size", [9 * 1024, 20_000 + 13])
def test_programs_walk_over_several_blocks_and_ranges(size, monkeypatch):
    """Eight blocks a program, with ranges that end inside, between and right at their borders."""
    monkeypatch.setattr(adamw, "_PROGRAMS", 1)
    starts = sorted({0, 1, 1024, 1025, 3000, 5 * 1024 - 1, 8 * 1024, *range(8200, 9000, 7)})
    groups = [k % 3 for k in range(len(starts))]
    state = torch.rand(4, size)
    # Small steps from weights above 1: a difference near zero would be all rounding.
    state += torch.tensor([1.0, 0.0, 0.0, 0.1])[:, None]
    results = []
    for backend in ("reference", "triton"):
        p, g, m, v = state.clone().unbind()
        counters, step = torch.zeros(2, dtype=torch.int32), torch.zeros(())
        with use_backend(backend):
            adamw_ema_(
                *(p, g, m, v, step),
                lr=[0.1, 0.2, 0.3],
                weight_decay=[0.5, 0.0, 0.1],
                starts=starts,
                groups=groups,
                counters=counters,
            )
        assert (float(step), *counters.tolist()) == (1, 0, 0)
        results.append((p, m, v))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)


def test_unaligned_ranges_are_updated_too():
    """A view that starts in the middle of a vector."""
    whole = [torch.rand(1101) for _ in range(4)]
    expected = [value[5:].clone() for value in whole]
    for values, backend in ((expected, "reference"), ([v[5:] for v in whole], "triton")):
        with use_backend(backend):
            adamw_ema_(*values, torch.zeros(()), lr=0.1)
    for mine, theirs in zip(whole, expected, strict=True):
        torch.testing.assert_close(mine[5:], theirs, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_norm_of_more_blocks_than_programs(dtype, monkeypatch):
    """Each program walks along several blocks, and the last one is incomplete."""
    monkeypatch.setattr(norm, "_PROGRAMS", tl.constexpr(4))
    block = norm._BLOCK_BYTES // dtype.itemsize
    value = torch.randn(7 * block + 13).to(dtype)
    with use_backend("triton"):
        found = sum_of_squares(value)
    torch.testing.assert_close(found.double(), value.double().square().sum(), rtol=1e-6, atol=0)


def test_the_bias_correction_is_exact_at_every_step():
    """1 - beta^t by a series near 0 and by the exponential elsewhere."""

    @triton.jit
    def kernel(out_ptr, log_base, step):
        tl.store(out_ptr, adamw._one_minus_power(log_base, step + tl.zeros([], tl.float32)))

    for beta in (0.9, 0.999, 0.99999):
        for step in (1, 2, 10, 499, 693, 1000, 100_000):
            out = torch.empty(1)
            kernel[(1,)](out, math.log(beta), float(step))
            assert float(out) == pytest.approx(-math.expm1(step * math.log(beta)), rel=4e-7)
