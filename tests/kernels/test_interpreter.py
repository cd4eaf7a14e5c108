"""Every Triton kernel, in the interpreter, against the reference.

An op's error against the float64 reference on the same (upcast) inputs may be twice that of the
float32 reference plus two ulp. Results stored in 16 bits get one ulp more, since the interpreter
truncates bfloat16 where a GPU rounds; results stored in float32 show that arithmetic is exact.

Interpreted programs cost 1.5 to 3 ms each, 15 ms with noise, so sizes and batches are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdistill.kernels import _sample, matching, noise
from fastdistill.ops import normal, uniform, use_backend
from fastdistill.ops._op import Op
from fastdistill.ops.denoising import _denoising_cotangent
from fastdistill.ops.density_ratio import _density_ratio_weight
from fastdistill.ops.matching import NORMALISER_FLOOR, _matching_cotangent
from fastdistill.ops.noise import _normal, _uniform
from fastdistill.ops.renoise import _renoise

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ULP = {F32: 2.0**-22, BF16: 2.0**-7, F16: 2.0**-10}
SMALLEST = {F32: 1e-37, BF16: 1e-37, F16: 2.0**-24}
# 1, odd, a multiple of 8 alone, one full block, the largest single program, two kinds of split.
SIZES = (1, 7, 1000, 4096, 16384, 20000, 32768)
# Storage of (x0, x_t, network outputs): one dtype, then latents above a bfloat16 network.
STORAGE = ((F32, F32), (BF16, BF16), (F16, F16), (F32, BF16))


def launch(op: Op, *args: Any) -> Any:
    """The op's result from its Triton launcher."""
    with use_backend("triton"):
        return op(*args)


def upcast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors and dtypes become ``dtype``, the rest stays."""
    if isinstance(value, torch.dtype):
        return dtype
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_accurate(op: Op, *args: Any, slack: float = 0.0) -> tuple[Tensor, ...]:
    """Launch, and compare each result with the reference as the module's docstring says."""
    got = launch(op, *args)
    shapes = op.reference(*args)
    plain = op.reference(*(upcast(value, torch.float32) for value in args))
    exact = op.reference(*(upcast(value, torch.float64) for value in args))
    for actual, like, near, true in zip(got, shapes, plain, exact, strict=True):
        assert (actual.shape, actual.dtype) == (like.shape, like.dtype)
        assert actual.isnan().equal(true.isnan())
        finite = true.isfinite() & (true.abs() <= torch.finfo(actual.dtype).max)
        assert actual[~finite].double().nan_to_num(0.0).equal(true[~finite].nan_to_num(0.0))
        actual, near, true = actual[finite].double(), near[finite].double(), true[finite]
        if true.numel() == 0:
            continue
        bound = 2 * (near - true).abs().max() + ULP[like.dtype] * true.abs() + slack
        excess = (actual - true).abs() - bound - SMALLEST[like.dtype]
        assert excess.max() <= 0, f"error {excess.max():.3e} above its bound"
    return got


def samples(batch: int, elements: int, *dtypes: torch.dtype) -> list[Tensor]:
    return [torch.randn(batch, elements).to(dtype) for dtype in dtypes]


def numbers(batch: int, count: int) -> list[Tensor]:
    """Positive coefficients in every storage, one of them expanded (stride 0)."""
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    values = [(torch.rand(batch) + 0.5).to(kinds[i % 4]) for i in range(count)]
    values[-1] = torch.tensor(0.75).expand(batch)
    return values


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- denoising ------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize(("latent", "raw"), STORAGE)
def test_denoising(elements: int, latent: torch.dtype, raw: torch.dtype) -> None:
    batch = 3 if elements < 10_000 else 1
    prediction, x0, x_t = samples(batch, elements, raw, latent, latent)
    a, b, weight = numbers(batch, 3)
    assert_accurate(_denoising_cotangent, prediction, x0, x_t, a, b, weight, 0.3)


def test_denoising_stores_float32_from_bfloat16_inputs_and_needs_no_weight() -> None:
    prediction, x0, x_t = samples(2, 500, F32, BF16, F16)
    a, b = numbers(2, 2)
    assert_accurate(_denoising_cotangent, prediction.view(2, 5, 10, 10), x0.view(2, 5, 10, 10),
                    x_t.view(2, 5, 10, 10), a, b, None, 1.0)  # fmt: skip


@pytest.mark.parametrize("elements", [1000, 20_000])
def test_denoising_keeps_what_is_not_finite(elements: int) -> None:
    prediction, x0, x_t = samples(3, elements, F32, F32, F32)
    prediction[0, 3], x_t[2, elements - 1] = math.nan, math.inf
    a, b = numbers(3, 2)
    cotangent, loss = assert_accurate(_denoising_cotangent, prediction, x0, x_t, a, b, None, 1.0)
    assert cotangent.isfinite().sum() == cotangent.numel() - 2
    assert loss.isfinite().tolist() == [False, True, False]


# --- matching -------------------------------------------------------------------------------------


def matching_arguments(
    batch: int,
    elements: int,
    latent: torch.dtype = F32,
    raw: torch.dtype = F32,
    uncond: bool = True,
    esd: bool = True,
    weighted: bool = True,
    normalise: bool = True,
    dtype: torch.dtype | None = None,
) -> list[Any]:
    x0, x_t = samples(batch, elements, latent, latent)
    teacher, teacher_uncond, critic, critic_uncond = samples(batch, elements, *[raw] * 4)
    a_phi, b_phi, a_psi, weight, b_psi = numbers(batch, 5)
    return [
        x0, x_t, teacher, a_phi, b_phi, critic, a_psi, b_psi,
        teacher_uncond if uncond else None, 3.0 if uncond else 1.0,
        critic_uncond if esd else None, 0.4 if esd else 0.0,
        weight if weighted else None, normalise, 5.0, dtype or latent,
    ]  # fmt: skip


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize(("latent", "raw"), STORAGE)
def test_matching(elements: int, latent: torch.dtype, raw: torch.dtype) -> None:
    batch = 3 if elements < 10_000 else 1
    assert_accurate(_matching_cotangent, *matching_arguments(batch, elements, latent, raw))


@pytest.mark.parametrize("elements", [7, 16_384, 20_000])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("options", ["", "uncond", "esd", "weighted"])
def test_matching_options(elements: int, normalise: bool, options: str) -> None:
    chosen = {name: name == options for name in ("uncond", "esd", "weighted")}
    arguments = matching_arguments(1, elements, normalise=normalise, dtype=F16, **chosen)
    assert_accurate(_matching_cotangent, *arguments)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("elements", [1000, 20_000])
@pytest.mark.parametrize("normalise", [True, False])
def test_matching_zeroes_what_is_not_finite(elements: int, normalise: bool) -> None:
    arguments = matching_arguments(3, elements, normalise=normalise)
    critic, teacher = arguments[5], arguments[2]
    critic[0, 0] = math.nan  # one element of g
    critic[0, elements - 1] = math.inf  # another
    teacher[1, elements - 1] = math.nan  # with the normaliser, the whole sample
    cotangent, statistics = assert_accurate(_matching_cotangent, *arguments)
    assert cotangent.isfinite().all()
    assert statistics[:, 3].tolist() == [2, elements if normalise else 1, 0]


def test_matching_has_no_rounding_where_teacher_and_critic_agree() -> None:
    arguments = matching_arguments(2, 1000, uncond=False, esd=False, weighted=False)
    arguments[5:8] = arguments[2:5]
    cotangent, _ = launch(_matching_cotangent, *arguments)
    assert cotangent.count_nonzero() == 0


def test_matching_has_the_floor_of_the_reference() -> None:
    assert matching.NORMALISER_FLOOR.value == NORMALISER_FLOOR


# --- noise ----------------------------------------------------------------------------------------

KEY = torch.tensor([-(2**40) - 12345, 2**35 + 7, 2**33 + 2**31 + 1])
ROWS = torch.tensor([0, -5, 2**34 + 2**31 + 9])


@pytest.mark.parametrize("elements", [1, 7, 1000, 4096, 5000])
def test_noise(elements: int) -> None:
    """Uniforms are the reference's bits; normals are within 1e-6 of its float64."""
    z = launch(_normal, KEY, ROWS, [elements], F32)
    u = launch(_uniform, KEY, ROWS, [elements], F32)
    exact = _normal.reference(KEY, ROWS, [elements], torch.float64)
    assert (z - exact).abs().max() < 1e-6
    assert u.equal(_uniform.reference(KEY, ROWS, [elements], F32))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_noise_in_16_bits(dtype: torch.dtype) -> None:
    for op in (_normal, _uniform):
        got = launch(op, KEY, ROWS[:1], [3, 5], dtype)
        exact = op.reference(KEY, ROWS[:1], [3, 5], torch.float64)
        assert got.shape == (1, 3, 5)
        torch.testing.assert_close(got.double(), exact, rtol=ULP[dtype], atol=1e-6)


def test_noise_depends_on_global_rows_alone() -> None:
    with use_backend("triton"):
        whole = normal(KEY, ROWS, [100])
        parts = [normal(KEY, row, [100]) for row in ROWS.split(1)]
        assert torch.cat(parts).equal(whole)
        assert not normal(KEY + torch.tensor([0, 0, 1]), ROWS, [100]).eq(whole).any()
        assert uniform(KEY, ROWS).shape == (3,)


@triton.jit
def _box_muller_probe(radius_ptr, angle_ptr, z_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    z0, z1 = noise.box_muller(tl.load(radius_ptr + lanes), tl.load(angle_ptr + lanes))
    tl.store(z_ptr + lanes, z0)
    tl.store(z_ptr + N + lanes, z1)


def test_normals_are_accurate_in_the_tails_and_near_u_equal_1() -> None:
    count = 2**16
    random = torch.randint(2**32, (count,))
    for radius in (
        random,
        torch.arange(count),  # the tail: words 0, 1, 2, ...
        2**32 - 1 - torch.arange(count) * 3,  # u = 1 and just below
        random >> torch.randint(32, (count,)),  # every exponent
    ):
        angle = torch.randint(2**32, (count,))
        angle[: count // 2] = angle[: count // 2] // 2**29 * 2**29 + torch.arange(count // 2) % 5
        z = torch.empty(2, count)
        _box_muller_probe[(1,)](radius.to(torch.uint32), angle.to(torch.uint32), z, N=count)
        u = radius.float().clamp(min=0.5).double() * 2.0**-32
        r, turn = torch.sqrt(-2 * u.log()), angle.double() * (2 * math.pi * 2.0**-32)
        exact = torch.stack((r * turn.cos(), r * turn.sin()))
        # Relative to the radius, so that the small normals near u = 1 are checked as well. The
        # interpreter rounds between multiplication and addition; with fused ones it is 1e-6.
        assert ((z - exact).abs() <= 2.0**-22 * r + 1e-18).all()
        assert ((z - exact).abs() < 1.1e-6).all()


# --- renoise --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latent", "raw"), STORAGE)
@pytest.mark.parametrize("elements", [7, 1000, 4096])
def test_renoise(elements: int, latent: torch.dtype, raw: torch.dtype) -> None:
    (x0,) = samples(2, elements, latent)
    alpha, sigma, scale = numbers(2, 3)
    # Normals are within 1e-6 of the reference's, and then multiplied by sigma and c_in.
    assert_accurate(_renoise, x0, alpha, sigma, KEY, ROWS[:2], scale, raw, slack=2.5e-6)


def test_renoise_without_a_network_input() -> None:
    (x0,) = samples(2, 300, F32)
    alpha, sigma = numbers(2, 2)
    x_t, empty = launch(_renoise, x0, alpha, sigma, KEY, ROWS[:2], None, None)
    assert empty.shape == (2, 0)
    assert empty.dtype == F32
    again, model_input = launch(_renoise, x0, alpha, sigma, KEY, ROWS[:2], None, F16)
    assert again.equal(x_t)
    assert model_input.equal(x_t.half())


def test_renoise_draws_the_noise_of_normal() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    x_t, _ = launch(_renoise, torch.ones(2, 999), zero, one, KEY, ROWS[:2], None, None)
    assert x_t.equal(launch(_normal, KEY, ROWS[:2], [999], F32))


# --- density ratio --------------------------------------------------------------------------------

H_TABLE = {
    "reverse KL": (0.0, 1.0, 0.0, 0.0),
    "softened reverse KL": (0.0, 1.0, 1.0, -1.0),
    "Jensen-Shannon": (1.0, 1.0, 1.0, -1.0),
    "Hellinger": (0.5, 1.0, 0.0, 0.0),
    "Jeffreys": (0.0, 1.0, 1.0, 1.0),
    "Neyman": (-1.0, 1.0, 0.0, 0.0),
    "Le Cam": (2.0, 1.0, 1.0, -3.0),
    "alpha": (-1.3, 1.0, 0.5, 0.7),
    "steep": (12.0, 1.0, 0.0, -2.5),
}
REST = (0.9, 1.0, 10.0, 0.1, 20.0)


@pytest.mark.parametrize("power", H_TABLE.values(), ids=H_TABLE)
def test_density_ratio_weights(power: tuple[float, ...]) -> None:
    logits, history = 2 * torch.randn(50, 3), 5 * torch.rand(10, 2)
    arguments = (logits, torch.randint(10, (50,)), history, *power, *REST)
    # x^p is good to about p ulp, as float32 logarithms are; powers above 8 only.
    assert_accurate(_density_ratio_weight, *arguments, slack=1e-4 if power[0] > 8 else 0.0)


@pytest.mark.parametrize(
    ("batch", "heads", "bins", "dtype"),
    [(1, 1, 1, F32), (3, 1, 10, BF16), (257, 5, 1000, F16), (2000, 1, 10, F32), (4, 1500, 3, F32)],
)
def test_density_ratio_shapes(batch: int, heads: int, bins: int, dtype: torch.dtype) -> None:
    logits, history = 2 * torch.randn(batch, heads).to(dtype), torch.rand(bins, 2)
    arguments = (logits, torch.randint(bins, (batch,)), history, *H_TABLE["Jensen-Shannon"], *REST)
    weight, _, _ = assert_accurate(_density_ratio_weight, *arguments)
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-5)


def test_density_ratio_keeps_nan() -> None:
    logits, bin_index = torch.randn(20, 1), torch.arange(20) % 4
    logits[6] = math.nan
    arguments = (logits, bin_index, torch.rand(4, 2), *H_TABLE["Jensen-Shannon"], *REST)
    _, ratio, history = assert_accurate(_density_ratio_weight, *arguments)
    assert ratio.isnan().tolist() == [b == 2 for b in bin_index.tolist()]
    assert history.isnan().any(dim=1).tolist() == [False, False, True, False]


# --- all ------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[int, torch.dtype], tuple[Op, list[Any]]]] = {
    "normal": lambda batch, dtype: (_normal, [KEY, ROWS[:batch], [4], dtype]),
    "uniform": lambda batch, dtype: (_uniform, [KEY, ROWS[:batch], [4], dtype]),
    "renoise": lambda batch, dtype: (
        _renoise,
        [*samples(batch, 4, dtype), *numbers(batch, 2), KEY, ROWS[:batch], None, dtype],
    ),
    "denoising": lambda batch, dtype: (
        _denoising_cotangent,
        [*samples(batch, 4, dtype, dtype, dtype), *numbers(batch, 3), 1.0],
    ),
    "matching": lambda batch, dtype: (
        _matching_cotangent,
        matching_arguments(batch, 4, dtype, dtype),
    ),
    "density_ratio": lambda batch, dtype: (
        _density_ratio_weight,
        [torch.randn(batch, 2).to(dtype), torch.zeros(batch, dtype=torch.long),
         torch.ones(3, 2, dtype=dtype), *H_TABLE["Hellinger"], *REST],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_an_empty_batch_gives_empty_results(name: str) -> None:
    op, arguments = CALLS[name](0, F32)
    got, one = launch(op, *arguments), op.reference(*CALLS[name](1, F32)[1])
    if isinstance(got, Tensor):
        got, one = (got,), (one,)
    for actual, like in zip(got, one, strict=True):
        batch = 3 if actual.shape == (3, 2) else 0  # the history of density ratios has no batch
        assert (actual.shape, actual.dtype) == ((batch, *like.shape[1:]), like.dtype)
        assert actual.equal(torch.full_like(actual, 0.9))


@pytest.mark.parametrize("name", CALLS)
def test_float64_is_refused_with_the_way_out(name: str) -> None:
    op, arguments = CALLS[name](2, torch.float64)
    with pytest.raises(ValueError, match=r'use_backend\("reference"\)'):
        launch(op, *arguments)


def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    op, arguments = CALLS["denoising"](4, F32)
    arguments[0] = arguments[0].T
    with pytest.raises(ValueError, match="contiguous"):
        launch(op, *arguments)


def test_more_bins_than_the_kernel_takes_are_refused() -> None:
    logits, index, history = torch.zeros(2, 1), torch.zeros(2).long(), torch.zeros(1025, 2)
    with pytest.raises(ValueError, match="1024"):
        launch(_density_ratio_weight, logits, index, history, *H_TABLE["Hellinger"], *REST)


@triton.jit
def _locate_probe(out_ptr, N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    sample, part, start, _, exists = _sample.locate(N, BLOCK, PARTS)
    tl.store(out_ptr, sample)
    tl.store(out_ptr + 1, part)
    tl.store(out_ptr + 2, start)
    tl.store(out_ptr + 3, tl.sum(exists.to(tl.int32)))


def test_offsets_past_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 2^31 - 1 programs, the most that a grid has, finds its elements."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    program, elements = 2**31 - 2, 65_536 + 100
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_get_program_id",
        lambda self, axis: TensorHandle(np.array([program], dtype=np.int32), tl.int32),
    )
    parts, options = _sample.cut(elements)
    out = torch.empty(4, dtype=torch.long)
    _locate_probe[(1,)](out, **{name: options[name] for name in ("N", "BLOCK", "PARTS")})
    sample, part = divmod(program, parts)
    block = options["BLOCK"]
    exists = min(block, elements - part * block)
    assert out.tolist() == [sample, part, sample * elements + part * block, exists]


def test_the_grid_and_the_cut_cover_every_element_once() -> None:
    for elements in (*SIZES, 16_385, 3 * 481 * 833 * 480):
        parts, options = _sample.cut(elements)
        assert (parts - 1) * options["BLOCK"] < elements <= parts * options["BLOCK"]
        assert (parts == 1) == (elements <= 16_384)
    with pytest.raises(ValueError, match="2147467264"):
        _sample.cut(2**31 - 1)
