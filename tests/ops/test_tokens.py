"""`modulated_norm`, `gated_residual` and `rms_norm_rope` against torch's and diffusers' own layers.

In float64 the references are the formulas, checked by finite differences as well; in float32 and
bfloat16 their error against float64 is at most twice that of the layers they replace.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops import gated_residual, modulated_norm, rms_norm_rope

B, T, C, H = 2, 7, 24, 3
Function = Callable[..., tuple[Tensor, ...]]


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def chunks(emb: Tensor) -> tuple[Tensor, ...]:
    return emb.chunk(3, dim=1)


def eager_gated(x, h, emb):
    scale, shift, gate = chunks(emb)
    total = x + gate[:, None] * h
    return total, F.layer_norm(total, (C,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def fused_gated(x, h, emb):
    scale, shift, gate = chunks(emb)
    return tuple(modulated_norm(x, scale=scale, shift=shift, residual=h, gate=gate))


def eager_modulated(x, h, emb):
    scale, shift, _ = chunks(emb)
    return (F.layer_norm(x, (C,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None] + 0 * h,)


def fused_modulated(x, h, emb):
    scale, shift, _ = chunks(emb)
    return (modulated_norm(x, scale=scale, shift=shift).y + 0 * h,)


def eager_affine(x, h, weight, bias):
    return x + h, F.layer_norm(x + h, (C,), weight, bias, eps=1e-5)


def fused_affine(x, h, weight, bias):
    return tuple(modulated_norm(x, weight=weight, bias=bias, residual=h, eps=1e-5))


def eager_residual(x, h, emb):
    return (x + chunks(emb)[0][:, None] * h,)


def fused_residual(x, h, emb):
    return (gated_residual(x, h, chunks(emb)[0]),)


def _diffusers_norm(x, weight):
    from diffusers.models.normalization import RMSNorm

    norm = RMSNorm(x.shape[-1], eps=1e-6)
    del norm.weight  # a parameter; what follows is a leaf of the test's
    norm.weight = weight
    if x.dtype == torch.float64:  # diffusers takes the mean in float32 whatever the input
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    return norm(x)


def eager_rms(x, w, second, w2):
    return (torch.cat([_diffusers_norm(x, w), _diffusers_norm(second, w2)], dim=1),)


def fused_rms(x, w, second, w2):
    return (rms_norm_rope(x, w, second, w2),)


ANGLES = tuple(draw((T + 2, 8), (T + 2, 8), seed=5))


def eager_rope(x, w, second, w2):
    cos, sin = (v[None, :, None].to(x.dtype if x.dtype == torch.float64 else F32) for v in ANGLES)
    (y,) = eager_rms(x, w, second, w2)
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return ((y.to(cos.dtype) * cos + turned.to(cos.dtype) * sin).to(x.dtype),)


def fused_rope(x, w, second, w2):
    wide = x.dtype if x.dtype == torch.float64 else F32
    return (rms_norm_rope(x, w, second, w2, rotary=tuple(v.to(wide) for v in ANGLES)),)


F32, BF16 = torch.float32, torch.bfloat16
TOKENS, HEADS, TEXT = (B, T, C), (B, T, H, 8), (B, 2, H, 8)
CASES: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "gated": (eager_gated, fused_gated, [TOKENS, TOKENS, (B, 3 * C)]),
    "modulated": (eager_modulated, fused_modulated, [TOKENS, TOKENS, (B, 3 * C)]),
    "affine": (eager_affine, fused_affine, [TOKENS, TOKENS, (C,), (C,)]),
    "residual": (eager_residual, fused_residual, [TOKENS, TOKENS, (B, 3 * C)]),
    "rms": (eager_rms, fused_rms, [HEADS, (8,), TEXT, (8,)]),
    "rope": (eager_rope, fused_rope, [HEADS, (8,), TEXT, (8,)]),
}


def run(function: Function, values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients of a fixed projection of them, in ``dtype`` all through."""
    leaves = [value.to(dtype).requires_grad_() for value in values]
    results = function(*leaves)
    pulls = draw(*(result.shape for result in results), seed=9)
    gradients = torch.autograd.grad(results, leaves, [p.to(dtype) for p in pulls])
    return [*results, *gradients]


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Values that ``dtype`` holds, so that float64 sees the same numbers."""
    return [value.to(dtype).double() for value in draw(*CASES[name][2])]


@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_layers_that_are_replaced(name):
    eager, fused, _ = CASES[name]
    values = inputs(name, F32)
    for mine, theirs in zip(
        run(fused, values, torch.float64), run(eager, values, torch.float64), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_twice_those_of_the_layers(name, dtype):
    eager, fused, _ = CASES[name]
    values = inputs(name, dtype)
    exact = run(eager, values, torch.float64)
    results = zip(run(fused, values, dtype), run(eager, values, dtype), exact, strict=True)
    for mine, theirs, true in results:
        assert mine.dtype == dtype
        bound = 2 * (theirs.double() - true).abs().max() + torch.finfo(dtype).eps * true.abs().max()
        assert (mine.double() - true).abs().max() <= bound


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    _, fused, shapes = CASES[name]
    leaves = [value.requires_grad_() for value in draw(*shapes)]
    assert torch.autograd.gradcheck(fused, leaves, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_gradients_come_only_for_what_needs_them(name):
    """Frozen modulations and weights: the same gradient of x, and none of the rest."""
    _, fused, shapes = CASES[name]
    values = draw(*shapes)
    everything = run(fused, values, torch.float64)
    x = values[0].clone().requires_grad_()
    results = fused(x, *values[1:])
    pulls = draw(*(result.shape for result in results), seed=9)
    (found,) = torch.autograd.grad(results, x, pulls)
    torch.testing.assert_close(found, everything[len(results)])


def saved_bytes(function: Callable[[], object], *kept: Tensor) -> int:
    """Bytes that autograd saves, each storage once and those of ``kept`` not at all."""
    known = {value.untyped_storage()._cdata for value in kept}
    found: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage()._cdata not in known:
            found[value.untyped_storage()._cdata] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        results = function()
    del results
    return sum(value.untyped_storage().nbytes() for value in found.values())


def test_only_inputs_and_two_numbers_a_token_are_kept():
    x, h, emb = (v.float().requires_grad_() for v in draw(TOKENS, TOKENS, (B, 3 * C)))
    total = B * T * C * 4
    numbers = 2 * B * T * 4
    assert saved_bytes(lambda: fused_gated(x, h, emb), x, h, emb) == numbers
    # Without a gate's gradient the sum x + gate * h takes the place of x and h.
    weight, bias = (v.float() for v in draw((C,), (C,)))
    kept = saved_bytes(lambda: fused_affine(x, h, weight, bias), weight)
    assert kept == total + numbers
    assert saved_bytes(lambda: fused_residual(x, h, emb), h, emb) == 0
    heads, w, text, w2 = (v.float().requires_grad_() for v in draw(HEADS, (8,), TEXT, (8,)))
    assert saved_bytes(lambda: fused_rms(heads, w, text, w2), heads, w, text, w2) == 0


def test_a_frozen_gate_does_not_keep_the_layers_output():
    x, h, emb = (v.float().requires_grad_() for v in draw(TOKENS, TOKENS, (B, 3 * C)))
    kept = saved_bytes(lambda: fused_gated(x, h * 1, emb.detach()), emb)
    assert kept == B * T * C * 4 + 2 * B * T * 4
    assert saved_bytes(lambda: fused_residual(x, h * 1, emb.detach()), emb) == 0


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "two modulations": (
        lambda: modulated_norm(
            torch.ones(B, T, C), scale=torch.ones(B, C), shift=torch.ones(B, C),
            weight=torch.ones(C), bias=torch.ones(C),
        ),
        "not both",
    ),
    "one of a pair": (lambda: modulated_norm(torch.ones(B, T, C), scale=torch.ones(B, C)), "give"),
    "a gate alone": (
        lambda: modulated_norm(
            torch.ones(B, T, C), weight=torch.ones(C), bias=torch.ones(C), gate=torch.ones(B, C)
        ),
        "residual, which is absent",
    ),
    "channels of another sample": (
        lambda: gated_residual(torch.ones(B, T, C), torch.ones(B, T, C), torch.ones(B + 1, C)),
        r"gate has shape \(3, 24\).* expected \(2, 24\)",
    ),
    "another residual": (
        lambda: gated_residual(torch.ones(B, T, C), torch.ones(B, T + 1, C), torch.ones(B, C)),
        "h has shape",
    ),
    "no tokens": (
        lambda: modulated_norm(torch.ones(B, C), weight=torch.ones(C), bias=torch.ones(C)),
        r"expected tokens \[B, T, C\]",
    ),
    "a weight of another width": (
        lambda: rms_norm_rope(torch.ones(HEADS), torch.ones(4)), r"expected \[B, T, H, D\] and"
    ),
    "half a second stream": (
        lambda: rms_norm_rope(torch.ones(HEADS), torch.ones(8), torch.ones(TEXT)), "both or neither"
    ),
    "angles of other tokens": (
        lambda: rms_norm_rope(
            torch.ones(HEADS), torch.ones(8), rotary=(torch.ones(3, 8), torch.ones(3, 8))
        ),
        r"cos has shape \(3, 8\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
