"""`adamw_ema_` against torch's own clipping, AdamW and averages; `sum_of_squares`."""

from __future__ import annotations

import platform

import pytest
import torch

from fastdistill.ops import adamw_ema_, sum_of_squares, use_backend
from fastdistill.ops.adamw import _stochastic_bfloat16
from fastdistill.ops.norm import _sum_of_squares

BACKENDS = ["reference", "cpu", "triton"]
SIZE = 1000  # no multiple of a block
KEY = torch.tensor([1, 2, 3])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class State:
    """Everything that the op updates."""

    def __init__(self, size: int = SIZE, averages: int = 1, copy: torch.dtype | None = None):
        self.parameter = random(size, seed=10)
        self.exp_avg, self.exp_avg_sq = torch.zeros(2, size).unbind()
        self.step = torch.zeros(())
        self.emas = [random(size, seed=20 + k) for k in range(averages)]
        self.copy = None if copy is None else torch.zeros(size, dtype=copy)

    def tensors(self) -> list[torch.Tensor]:
        found = [self.parameter, self.exp_avg, self.exp_avg_sq, self.step, *self.emas]
        return found if self.copy is None else [*found, self.copy]

    def update(self, gradient: torch.Tensor, **options) -> None:
        options = {"lr": 1e-2, "ema_decays": [0.9] * len(self.emas)} | options
        adamw_ema_(
            *(self.parameter, gradient, self.exp_avg, self.exp_avg_sq, self.step),
            emas=self.emas,
            copy=self.copy,
            **options,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [None, 1.0, 1e6])
def test_ten_updates_are_those_of_torch(max_norm, backend):
    """clip_grad_norm_, AdamW, an average and a cast: within an ulp or two a step."""
    state = State(copy=torch.bfloat16)
    parameter = torch.nn.Parameter(state.parameter.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, fused=True)
    average = state.emas[0].clone()
    for step in range(10):
        gradient = random(SIZE, seed=step) * 3.0 ** (step % 3)
        parameter.grad = gradient.clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        optimizer.step()
        average.lerp_(parameter.detach(), 0.1)
        with use_backend(backend):
            state.update(
                gradient,
                weight_decay=0.1,
                squared_norm=sum_of_squares(gradient),
                max_norm=max_norm,
            )
    torch.testing.assert_close(state.parameter, parameter.detach(), rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(state.emas[0], average, rtol=2e-6, atol=2e-7)
    moments = optimizer.state[parameter]
    torch.testing.assert_close(state.exp_avg, moments["exp_avg"], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state.exp_avg_sq, moments["exp_avg_sq"], rtol=2e-6, atol=1e-9)
    assert state.step == moments["step"] == 10
    place = 2.0**-7 if backend == "triton" else 2.0**-8  # the interpreter truncates
    torch.testing.assert_close(state.copy.float(), state.parameter, rtol=place, atol=0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch fuses otherwise elsewhere")
def test_updates_on_the_cpu_are_torchs_bit_by_bit():
    """But for what torch's vectors leave over at the end, which it computes in another order."""
    state = State(4096)
    average = state.emas[0].clone()
    parameter = torch.nn.Parameter(state.parameter.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(20):
        parameter.grad = random(4096, seed=step)
        optimizer.step()
        average.lerp_(parameter.detach(), 0.1)
        with use_backend("cpu"):
            state.update(parameter.grad, weight_decay=0.1)
    moments = optimizer.state[parameter]
    assert torch.equal(state.parameter, parameter)
    assert torch.equal(state.exp_avg, moments["exp_avg"])
    assert torch.equal(state.exp_avg_sq, moments["exp_avg_sq"])
    assert torch.equal(state.emas[0], average)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("averages", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 63, 4096, 5000])
def test_backends_are_the_reference(size, averages, copy, gradient_dtype, backend):
    if backend == "triton" and size > 4096 and averages == 3:
        pytest.skip("covered by the other sizes; the interpreter is slow")
    ours, theirs = State(size, averages, copy), State(size, averages, copy)
    gradient = random(size, seed=1).to(gradient_dtype)
    options = {
        "squared_norm": sum_of_squares(gradient),
        "max_norm": 0.5,
        "grad_scale": torch.tensor(8.0),
        "lr_factor": torch.tensor(0.3),
        "ema_decays": [0.9, 0.99, 0.5][:averages],
        "ema_warmup": True,
    }
    for _ in range(2):
        with use_backend("reference"):
            theirs.update(gradient, **options)
        with use_backend(backend):
            ours.update(gradient, **options)
    for mine, reference in zip(ours.tensors(), theirs.tensors(), strict=True):
        place = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(mine.dtype, 2e-6)
        torch.testing.assert_close(mine, reference, rtol=place, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_late_bias_corrections_are_exact(backend):
    """1 - beta^t for small and large t, where float32 alone would lose digits."""
    for done in (0, 1, 9, 999, 100_000):
        state, exact = State(64, 0), State(64, 0)
        exact.parameter, exact.exp_avg, exact.exp_avg_sq = (
            value.double() for value in (exact.parameter, exact.exp_avg, exact.exp_avg_sq)
        )
        state.step += done
        exact.step += done
        before = exact.parameter.clone()
        with use_backend("reference"):
            exact.update(random(64).double(), lr=1.0, weight_decay=0.0)
        with use_backend(backend):
            state.update(random(64), lr=1.0, weight_decay=0.0)
        moved = exact.parameter - before
        error = (state.parameter.double() - exact.parameter).abs() / (moved.abs() + before.abs())
        assert error.max() < 3e-7, done
        assert state.step == done + 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_changes_no_byte(value, backend):
    state = State(averages=2, copy=torch.bfloat16)
    gradient = random(SIZE)
    with use_backend(backend):
        state.update(gradient, squared_norm=sum_of_squares(gradient))
        before = [tensor.clone() for tensor in state.tensors()]
        gradient[617] = value
        state.update(gradient, squared_norm=sum_of_squares(gradient), max_norm=1.0)
    for tensor, old in zip(state.tensors(), before, strict=True):
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), old.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_have_their_own_rate_and_decay(backend):
    """Three ranges in one call are three calls; borders need not fall on blocks."""
    starts, rates, decays = [0, 3, 700], [1e-2, 3e-2, 0.0], [0.1, 0.0, 0.5]
    together, apart = State(), State()
    gradient = random(SIZE)
    with use_backend(backend):
        together.update(gradient, lr=rates, weight_decay=decays, starts=starts)
        for k, start in enumerate(starts):
            part = slice(start, [*starts[1:], SIZE][k])
            adamw_ema_(
                *(apart.parameter[part], gradient[part], apart.exp_avg[part]),
                *(apart.exp_avg_sq[part], torch.zeros(())),
                lr=rates[k],
                weight_decay=decays[k],
                emas=[apart.emas[0][part]],
                ema_decays=[0.9],
            )
    for mine, other in ((together.parameter, apart.parameter), (together.emas[0], apart.emas[0])):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def ranges_of(size: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Starts and groups of many ranges of very different lengths, also of one element."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(1, size, (200,), generator=generator).tolist()
    starts = sorted({0, 1, 2, size // 2, size - 1, *cuts, *range(1024, size, 1024)})
    groups = torch.randint(0, 3, (len(starts),), generator=generator)
    return starts, groups.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [5000, 8192])
def test_hundreds_of_ranges_share_the_rates_of_a_few_groups(size, backend):
    starts, groups = ranges_of(size)
    rates, decays = [1e-2, 3e-2, 0.0], [0.1, 0.0, 0.5]
    mixed, pure = State(size), [State(size) for _ in rates]
    gradient = random(size)
    with use_backend(backend):
        mixed.update(gradient, lr=rates, weight_decay=decays, starts=starts, groups=groups)
        for state, rate, decay in zip(pure, rates, decays, strict=True):
            state.update(gradient, lr=rate, weight_decay=decay)
    sizes = torch.tensor([*starts[1:], size]) - torch.tensor(starts)
    owner = torch.tensor(groups).repeat_interleave(sizes)
    for group, state in enumerate(pure):
        mine = owner == group
        torch.testing.assert_close(mixed.parameter[mine], state.parameter[mine], rtol=1e-6, atol=0)
        torch.testing.assert_close(mixed.emas[0][mine], state.emas[0][mine], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_range_may_be_of_any_group_and_groups_may_be_absent(backend):
    one, same = State(), State()
    with use_backend(backend):
        one.update(random(SIZE), lr=[0.5, 1e-2, 0.7], weight_decay=0.1, groups=[1])
        same.update(random(SIZE), lr=1e-2, weight_decay=0.1)
    assert torch.equal(one.parameter, same.parameter)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 16, SIZE, 4096])
def test_updates_and_skipped_updates_are_counted(size, backend):
    state, counters = State(size), torch.zeros(2, dtype=torch.int32)
    seen = []
    with use_backend(backend):
        for norm in (1.0, float("nan"), 4.0, float("inf"), float("nan"), 1.0):
            state.update(random(size), squared_norm=torch.tensor(norm), counters=counters)
            seen.append((int(state.step), *counters.tolist()))
        state.update(random(size), counters=counters)
    assert seen == [(1, 0, 0), (1, 1, 0), (2, 1, 0), (2, 2, 0), (2, 3, 0), (3, 3, 0)]
    assert (int(state.step), *counters.tolist()) == (4, 3, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_forget_their_start_early_if_asked_to(backend):
    """After n updates an average keeps at most (1 + n) / (10 + n) of itself."""
    for done, warmup, kept in (
        (0, True, 0.1),
        (8, True, 0.5),
        (10**6, True, 0.999),
        (0, False, 0.999),
    ):
        state = State()
        state.step += done
        before = state.emas[0].clone()
        with use_backend(backend):
            state.update(random(SIZE), ema_decays=[0.999], ema_warmup=warmup)
        expected = kept * before + (1 - kept) * state.parameter
        torch.testing.assert_close(state.emas[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("key", [KEY, torch.tensor([-5, 2**31, 2**33 + 1])], ids=["small", "large"])
def test_stochastic_rounding_has_the_bits_of_the_reference(key, backend):
    state = State(copy=torch.bfloat16)
    with use_backend(backend):
        state.update(random(SIZE), key=key)
    assert torch.equal(state.copy, _stochastic_bfloat16(state.parameter, key))


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact():
    value = torch.full((100_000,), 1.0 + 2.0**-9)  # a quarter of the way to the next bfloat16
    rounded = _stochastic_bfloat16(value, KEY).double()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert rounded.mean() == pytest.approx(1.0 + 2.0**-9, abs=4 * 2.0**-7 * 0.433 / 316)
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), 3.0e38])
    kept = _stochastic_bfloat16(special, KEY)
    assert torch.equal(kept[:6].float(), special[:6])
    assert _stochastic_bfloat16(torch.tensor([float("nan")]), KEY).isnan().all()


def test_wrong_input_is_refused():
    state = State(8)
    gradient = random(8)

    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            state.update(options.pop("gradient", gradient), **options)

    refused("gradient has shape", gradient=random(7))
    refused("needs squared_norm", max_norm=1.0)
    refused("1 emas and 2 ema_decays", ema_decays=[0.9, 0.8])
    refused("starts is", starts=[0, 8], lr=[1.0, 1.0])
    refused("starts is", starts=[1])
    refused("groups is", starts=[0, 4], groups=[0])
    refused("groups is", starts=[0, 4], groups=[0, -1])
    refused("2 groups have 1 values", starts=[0, 4], groups=[0, 1], lr=[1.0])
    refused("have 2 and 3 values", groups=[0], lr=[1.0] * 2, weight_decay=[0.0] * 3)
    refused("1 groups have 2 values", lr=[1.0] * 2)
    refused("at most 64", groups=[64])
    refused("counters is", counters=torch.zeros(2))
    refused("counters is", counters=torch.zeros(4, dtype=torch.int32)[::2])
    refused("one number, or one for each group", starts=[0, 4], lr=[1.0])
    refused("rounds a bfloat16 copy", key=KEY)
    refused("expected a scalar", squared_norm=torch.zeros(2))
    state.exp_avg = state.exp_avg.double()
    refused(r"exp_avg is torch\.float64")
    state = State(8)
    state.parameter = state.parameter.bfloat16()
    refused("master weights")
    state = State(8)
    state.emas = [torch.zeros(16)[::2]]
    refused("strides")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 31, 4096, 100_003])
def test_sum_of_squares_is_the_squared_norm(size, dtype, backend):
    value = random(size).to(dtype)
    exact = value.double().square().sum()
    with use_backend(backend):
        found = sum_of_squares(value)
        again = sum_of_squares(value.clone())
    assert (found.shape, found.dtype) == ((), torch.float32)
    assert torch.equal(found, again)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_sum_of_squares_is_not_finite_where_any_element_is_not(value, backend):
    values = random(70_000)
    values[69_999] = value
    with use_backend(backend):
        assert not sum_of_squares(values).isfinite()
        assert sum_of_squares(values[:-1]).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_of_squares_of_any_shape_and_stride(backend):
    value = random(30, 40)
    with use_backend(backend):
        torch.testing.assert_close(sum_of_squares(value.t()[::2]), value.t()[::2].square().sum())
    with pytest.raises(ValueError, match=r"torch\.int64"):
        sum_of_squares(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 5, 4096, 70_000])
def test_a_ticket_changes_nothing_and_is_left_zero(size, backend):
    value, ticket = random(size), torch.zeros(1, dtype=torch.int32)
    with use_backend(backend):
        plain = sum_of_squares(value)
        assert torch.equal(sum_of_squares(value, ticket=ticket), plain)
        assert torch.equal(sum_of_squares(value, ticket=ticket), plain)
    assert ticket == 0


def test_a_ticket_of_another_form_is_refused():
    for ticket in (torch.zeros(1), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"expected torch\.zeros\(1"):
            sum_of_squares(random(4), ticket=ticket)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck_of_the_ticket(backend):
    with use_backend(backend):
        args = (random(100), torch.zeros(1, dtype=torch.int32))
        torch.library.opcheck(_sum_of_squares.overload, args)
