"""Properties of every op over shapes, dtypes, strides and extreme values, found by hypothesis.

For each op one builder makes the arguments of the public function from drawn samples; the same
properties then hold of all: the C++ backend is as exact as torch, results do not depend on strides
or on the other samples of the batch, cotangents are linear in ``scale``, and extreme input is
treated as the reference treats it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from fastdistill.ops import (
    Coefficients,
    Distance,
    adamw_ema_,
    consistency_cotangent,
    denoising_cotangent,
    gaussian_transport,
    matching_cotangent,
    mixture_denoise,
    projection_cotangents,
    renoise,
    sum_of_squares,
    use_backend,
)

COMPUTE = (torch.float32, torch.bfloat16, torch.float16)
quick = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclasses.dataclass(frozen=True)
class Input:
    """A batch of ``count`` sample-like tensors, numbers a sample, and discrete choices."""

    samples: list[Tensor]
    numbers: list[Tensor]
    choice: int
    scale: float


@st.composite
def inputs(draw: st.DrawFn, extreme: bool = False) -> Input:
    """Tensors [B, ...] of mixed dtypes and strides, coefficients positive and of order one."""
    batch = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def sample() -> Tensor:
        value = torch.randn(batch, *shape, generator=generator)
        if extreme:
            kind = draw(st.sampled_from(EXTREMES))
            place = draw(st.integers(0, value.numel() - 1))
            value.view(-1)[place] = kind
        return strided(value.to(draw(st.sampled_from(COMPUTE))), draw(st.integers(0, 3)))

    def number() -> Tensor:
        value = torch.rand(batch, generator=generator, dtype=torch.float64) + 0.4
        value = value.to(draw(st.sampled_from((torch.float32, torch.float64))))
        return value[0].expand(batch) if draw(st.booleans()) else value

    return Input(
        [sample() for _ in range(5)],
        [number() for _ in range(6)],
        draw(st.integers(0, 7)),
        draw(st.sampled_from((1.0, 0.25, 1e-4))),
    )


EXTREMES = (0.0, -0.0, 1e-40, 1e-30, 6e4, 1e30, -1e38, math.inf, -math.inf, math.nan)


def strided(value: Tensor, kind: int) -> Tensor:
    """The same numbers in another memory layout."""
    if kind == 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2:
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), math.nan, dtype=value.dtype)
        wide[..., ::2] = value
        return wide[..., ::2]
    if kind == 3 and value.ndim == 4:
        return value.to(memory_format=torch.channels_last)
    return value


DISTANCES = (
    Distance.squared_l2(),
    Distance.pseudo_huber(0.3),
    Distance.power(1.5),
    Distance.l1(),
)


def matching(data: Input, scale: float) -> tuple[Tensor, ...]:
    x0, x_t, teacher, critic, uncond = data.samples
    a, b, c, d, weight, _ = data.numbers
    guided = {"teacher_uncond": uncond, "guidance_scale": 3.0} if data.choice & 1 else {}
    result = matching_cotangent(
        *(x0, x_t, teacher, Coefficients(a, b), critic, Coefficients(c, d)),
        weight=weight,
        normalise=bool(data.choice & 2),
        scale=scale,
        dtype=torch.float32,
        **guided,
    )
    return result.cotangent, result.loss


def denoising(data: Input, scale: float) -> tuple[Tensor, ...]:
    raw, x0, x_t, *_ = data.samples
    a, b, weight, *_ = data.numbers
    result = denoising_cotangent(raw, x0, x_t, Coefficients(a, b), weight, scale)
    return result.cotangent, result.loss


def projection(data: Input, scale: float) -> tuple[Tensor, ...]:
    x0, x_t, teacher, critic, uncond = data.samples
    a, b, c, d, weight, k = data.numbers
    guided = {"teacher_uncond": uncond, "guidance_scale": 3.0} if data.choice & 1 else {}
    result = projection_cotangents(
        *(x0, x_t, teacher, Coefficients(a, b), critic, Coefficients(c, d)),
        distance=DISTANCES[data.choice % 4],
        alpha=0.5 + data.choice / 8,
        score_scale=k,
        weight=weight,
        normalise=bool(data.choice & 2),
        scale=scale,
        **guided,
    )
    return result.x0, result.x_t, result.teacher, result.critic, result.loss


def consistency(data: Input, scale: float) -> tuple[Tensor, ...]:
    raw, x_t, target, x_r, _ = data.samples
    a, b, c, d, weight, _ = data.numbers
    earlier = {"target_x": x_r, "target_coefficients": Coefficients(c, d)}
    result = consistency_cotangent(
        *(raw, x_t, Coefficients(a, b), target),
        distance=DISTANCES[data.choice % 4],
        weight=weight,
        scale=scale,
        **(earlier if data.choice & 4 else {}),
    )
    return result.cotangent, result.loss


def noising(data: Input, scale: float) -> tuple[Tensor, ...]:
    x0, (alpha, sigma, c_in, *_) = data.samples[0], data.numbers
    index = torch.arange(len(x0)) + data.choice
    key = torch.tensor([5, 6, 7])
    return tuple(renoise(x0, alpha, sigma, key, index, c_in, torch.float32))


def mixture(data: Input, scale: float) -> tuple[Tensor, ...]:
    x, (alpha, sigma, *_) = data.samples[0], data.numbers
    generator = torch.Generator().manual_seed(data.choice)
    means = torch.randn(3, *x.shape[1:], generator=generator)
    spread = torch.rand(3, *(x.shape[1:] if data.choice & 1 else ()), generator=generator)
    return tuple(mixture_denoise(x, alpha, sigma, means, spread))


def transport(data: Input, scale: float) -> tuple[Tensor, ...]:
    x, (alpha, sigma, to_alpha, to_sigma, *_) = data.samples[0], data.numbers
    generator = torch.Generator().manual_seed(data.choice)
    elements = x[0].numel()
    rank = min(elements, 1 + data.choice)
    basis, _ = torch.linalg.qr(torch.randn(elements, rank, generator=generator))
    mean, spectrum = torch.randn(elements, generator=generator), torch.arange(rank) + 0.5
    return tuple(
        gaussian_transport(
            *(x, mean, basis, spectrum, alpha, sigma, to_alpha, to_sigma), floor=0.1, denoise=True
        )
    )


COTANGENTS = {
    "matching": matching,
    "denoising": denoising,
    "projection": projection,
    "consistency": consistency,
}
OPS = COTANGENTS | {"renoise": noising, "mixture": mixture, "transport": transport}
Run = Callable[[Input, float], tuple[Tensor, ...]]


def change(data: Input, tensor: Callable[[Tensor], Tensor]) -> Input:
    return Input(
        [tensor(value) for value in data.samples],
        [tensor(value) for value in data.numbers],
        data.choice,
        data.scale,
    )


def run_on(backend: Any, run: Run, data: Input, scale: float = 1.0) -> tuple[Tensor, ...]:
    with use_backend(backend):
        return run(data, scale)


@pytest.mark.parametrize("name", OPS)
@given(data=inputs())
@quick
def test_error_is_at_most_twice_torchs(name: str, data: Input) -> None:
    exact = run_on("reference", OPS[name], change(data, Tensor.double), data.scale)
    plain = run_on("reference", OPS[name], data, data.scale)
    found = run_on("cpu", OPS[name], data, data.scale)
    for mine, torchs, truth in zip(found, plain, exact, strict=True):
        assert (mine.dtype, mine.shape) == (torchs.dtype, torchs.shape)
        place = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        bound = 2 * (torchs.double() - truth).abs().max() + place + 1e-37
        assert (mine.double() - truth).abs().max() <= bound


@pytest.mark.parametrize("name", OPS)
@given(data=inputs())
@quick
def test_strides_do_not_matter(name: str, data: Input) -> None:
    dense = change(data, lambda value: value.clone(memory_format=torch.contiguous_format))
    found, expected = (run_on("cpu", OPS[name], value) for value in (data, dense))
    for mine, theirs in zip(found, expected, strict=True):
        # In channels-last order sums are taken in another order.
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("transport", "renoise")])
@given(data=inputs())
@quick
def test_a_sample_does_not_depend_on_its_batch(name: str, data: Input) -> None:
    data = change(data, lambda value: value.contiguous())
    together = run_on("cpu", OPS[name], data)
    last = len(data.samples[0]) - 1
    alone = run_on("cpu", OPS[name], change(data, lambda value: value[last:]))
    for whole, part in zip(together, alone, strict=True):
        assert torch.equal(whole[last:], part)


@pytest.mark.parametrize("name", COTANGENTS)
@given(data=inputs())
@quick
def test_scale_multiplies_cotangents_and_not_losses(name: str, data: Input) -> None:
    data = change(data, lambda value: value.float())
    *ones, loss = run_on("cpu", OPS[name], data, 1.0)
    *quarters, same = run_on("cpu", OPS[name], data, 0.25)
    assert torch.equal(loss, same)
    for one, quarter in zip(ones, quarters, strict=True):
        torch.testing.assert_close(quarter, one / 4, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("name", OPS)
@given(data=inputs(extreme=True))
@quick
def test_extreme_values_are_treated_as_the_reference_treats_them(name: str, data: Input) -> None:
    """Never a crash, and what is finite in the reference's float32 is finite here, and close."""
    plain = run_on("reference", OPS[name], change(data, Tensor.float))
    found = run_on("cpu", OPS[name], change(data, Tensor.float))
    for mine, theirs in zip(found, plain, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        kept = theirs.isfinite()
        largest = theirs[kept].abs().max() if kept.any() else 0.0
        torch.testing.assert_close(mine[kept], theirs[kept], rtol=1e-4, atol=float(1e-5 * largest))


@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    cuts=st.sets(st.integers(1, 299), max_size=3),
    dtype=st.sampled_from(COMPUTE),
    averages=st.integers(0, 2),
)
@quick
def test_updates_are_those_of_the_reference(size, seed, cuts, dtype, averages) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(4 + averages, size, generator=generator)
    gradient = start[0].to(dtype)
    starts = [0, *sorted(cut for cut in cuts if cut < size)]
    results = []
    for backend in ("reference", "cpu"):
        state = start.clone()
        state[3].abs_()
        copy = torch.zeros(size, dtype=torch.bfloat16)
        step = torch.tensor(float(seed % 1000))
        with use_backend(backend):
            norm = sum_of_squares(gradient)
            adamw_ema_(
                *(state[1], gradient, state[2], state[3], step),
                lr=[1e-3 * (k + 1) for k in range(len(starts))],
                weight_decay=[0.1 / (k + 1) for k in range(len(starts))],
                starts=starts,
                squared_norm=norm,
                max_norm=1.0,
                emas=list(state[4:]),
                ema_decays=[0.9] * averages,
                copy=copy,
            )
        assert step == seed % 1000 + 1
        results.append((norm, state, copy.float()))
    for (one, other), place in zip(zip(*results, strict=True), (1e-6, 2e-6, 2**-7), strict=True):
        torch.testing.assert_close(other, one, rtol=place, atol=1e-6)
