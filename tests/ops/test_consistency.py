"""`consistency_cotangent` against autograd, and where consistency losses must vanish."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill.ops import Coefficients, Distance, consistency_cotangent, use_backend

BACKENDS = ["reference", "cpu", "triton"]
DISTANCES = {
    "squared_l2": Distance.squared_l2(),
    "pseudo_huber": Distance.pseudo_huber(0.7),
    "norm": Distance.pseudo_huber(0.0),
    "power": Distance.power(1.5),
    "l1": Distance.l1(),
}


def case(shape=(3, 2, 4, 8)):
    """Raw output, x_t, raw target output, x_r, (a, b) twice and weights, in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    numbers = torch.rand(5, shape[0], generator=generator, dtype=torch.float64) + 0.3
    return draw, Coefficients(*numbers[:2]), Coefficients(*numbers[2:4]), numbers[4]


def distance_of(residual, distance):
    flat = residual.flatten(1)
    if distance.elementwise:
        return flat.abs().sum(1)
    square = flat.square().sum(1) + distance.offset**2
    return square ** (distance.exponent / 2) - distance.offset**distance.exponent


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw_target", [True, False])
@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_and_cotangent_are_autograds(distance, raw_target, backend):
    (raw, x_t, target, x_r), online, earlier, weight = case()
    wide = (-1, 1, 1, 1)
    raw = raw.requires_grad_()
    aim = target
    if raw_target:
        aim = earlier.a.view(wide) * x_r + earlier.b.view(wide) * target
    residual = online.a.view(wide) * x_t + online.b.view(wide) * raw - aim
    expected = weight * distance_of(residual, DISTANCES[distance])
    (gradient,) = torch.autograd.grad(0.5 * expected.sum(), raw)
    dtype = torch.float64 if backend == "reference" else torch.float32
    stored = [value.detach().to(dtype).requires_grad_() for value in (raw, x_t, target, x_r)]
    extra = {"target_x": stored[3], "target_coefficients": earlier} if raw_target else {}
    with use_backend(backend):
        result = consistency_cotangent(
            *stored[:2],
            online,
            stored[2],
            distance=DISTANCES[distance],
            weight=weight,
            scale=0.5,
            **extra,
        )
        (live,) = torch.autograd.grad(result.loss.sum(), stored[0])
    tight = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(result.loss.detach().double(), expected.detach(), **tight)
    torch.testing.assert_close(result.cotangent.double(), gradient, **tight)
    torch.testing.assert_close(live, 2 * result.cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pseudo_huber_is_of_whole_samples(backend):
    """With the whole sample's c, an elementwise pseudo-Huber would be 33 times larger."""
    elements = 3 * 32 * 32
    c = 0.00054 * math.sqrt(elements)
    generator = torch.Generator().manual_seed(0)
    residual = 0.1 * torch.randn(1, 3, 32, 32, generator=generator)
    one, zero = torch.ones(1), torch.zeros(1)
    with use_backend(backend):
        loss = consistency_cotangent(
            residual,
            residual,
            Coefficients(zero, one),
            torch.zeros_like(residual),
            distance=Distance.pseudo_huber(c),
        ).loss
    whole = math.sqrt(float(residual.double().square().sum()) + c * c) - c
    elementwise = float(((residual.double().square() + c * c).sqrt() - c).sum())
    assert float(loss) == pytest.approx(whole, rel=1e-5)
    assert elementwise > 30 * whole


@pytest.mark.parametrize("backend", BACKENDS)
def test_pseudo_huber_of_a_small_residual_does_not_cancel(backend):
    """d = r^2 / (2c) for r << c, where sqrt(r^2 + c^2) - c in float32 is 0."""
    x = torch.full((1, 4), 1e-5)
    ones = torch.ones(1)
    with use_backend(backend):
        loss = consistency_cotangent(
            x, x, Coefficients(0 * ones, ones), 0 * x, distance=Distance.pseudo_huber(1.0)
        ).loss
    assert float(loss) == pytest.approx(2e-10, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_cotangent_vanishes_at_the_fixed_point(distance, backend):
    (raw, x_t, *_), online, _, weight = case()
    ours = [value.float() for value in (raw, x_t)]
    with use_backend(backend):
        result = consistency_cotangent(
            *ours,
            online,
            ours[0],
            distance=DISTANCES[distance],
            target_x=ours[1],
            target_coefficients=online,
            weight=weight,
        )
    assert result.cotangent.abs().max() == 0
    assert result.loss.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_consistency_function_of_a_gaussian_has_no_loss(backend):
    """f(x, s) = mu + sqrt((v + s_min^2) / (v + s^2)) (x - mu): constant along trajectories."""
    mu, v, lowest = 0.3, 0.5, 0.002
    z = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def at(sigma):
        x = mu + math.sqrt(v + sigma**2) * z  # one trajectory of the probability-flow ODE
        gain = math.sqrt((v + lowest**2) / (v + sigma**2))
        skip = torch.full((4,), gain, dtype=torch.float64)
        return x.float(), torch.full_like(x, mu * (1 - gain)).float(), skip

    (x_t, offset, skip), (x_r, offset_r, skip_r) = at(3.0), at(1.0)
    ones = torch.ones(4)
    with use_backend(backend):
        result = consistency_cotangent(
            *(offset, x_t, Coefficients(skip, ones), offset_r),
            distance=Distance.squared_l2(),
            target_x=x_r,
            target_coefficients=Coefficients(skip_r, ones),
        )
    assert result.loss.max() < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_not_hidden(backend):
    (raw, x_t, target, _), online, _, _ = case()
    raw[1, 0, 0, 0] = float("nan")
    stored = [value.float() for value in (raw, x_t, target)]
    with use_backend(backend):
        result = consistency_cotangent(
            *stored[:2], online, stored[2], distance=Distance.pseudo_huber(0.1)
        )
    assert result.loss.isfinite().tolist() == [True, False, True]
    assert result.cotangent[1].isnan().all()  # the norm is the whole sample's
    assert result.cotangent[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_in_channels_last_out(backend):
    (raw, x_t, target, _), online, _, _ = case()
    dense = [value.float() for value in (raw, x_t, target)]
    strided = [value.to(memory_format=torch.channels_last) for value in dense]
    with use_backend(backend):
        one, two = (
            consistency_cotangent(r, x, online, t, distance=Distance.squared_l2())
            for r, x, t in (dense, strided)
        )
    assert two.cotangent.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(two.cotangent, one.cotangent)


def test_half_a_raw_target_is_refused():
    (raw, x_t, target, x_r), online, _, _ = case()
    with pytest.raises(ValueError, match="belong together"):
        consistency_cotangent(
            raw, x_t, online, target, distance=Distance.squared_l2(), target_x=x_r
        )
