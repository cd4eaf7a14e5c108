"""`projection_cotangents` against autograd of the losses that it stands for."""

from __future__ import annotations

import pytest
import torch

from fastdistill.diffusion import Noise
from fastdistill.ops import Coefficients, Distance, projection_cotangents, renoise, use_backend

BACKENDS = ["reference", "cpu", "triton"]
DISTANCES = {
    "squared_l2": Distance.squared_l2(),
    "pseudo_huber": Distance.pseudo_huber(0.7),
    "norm": Distance.pseudo_huber(0.0),
    "power": Distance.power(1.5),
    "cube": Distance.power(3.0),
    "l1": Distance.l1(),
}
GUIDANCE = 2.5


def case(shape=(3, 2, 4, 8), gap=0.5):
    """x0, x_t and the raw outputs of teacher, unconditional teacher and critic, in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    draw[4] = draw[2] + gap * draw[4]
    numbers = torch.rand(6, shape[0], generator=generator, dtype=torch.float64) + 0.3
    return draw, Coefficients(*numbers[:2]), Coefficients(*numbers[2:4]), *numbers[4:]


def losses(tensors, teacher, critic, weight, k, distance, alpha, normalise):
    """The loss of each sample as the papers write it, for autograd."""
    x0, x_t, cond, uncond, raw = tensors

    def wide(value):
        return value.view(-1, *[1] * (x0.ndim - 1))

    def inner(one, other):
        return (one * other).flatten(1).sum(1)

    guided = uncond + GUIDANCE * (cond - uncond)
    d_phi = wide(teacher.a) * x_t + wide(teacher.b) * guided
    d_psi = wide(critic.a) * x_t + wide(critic.b) * raw
    gap = d_phi - d_psi
    y = wide(k) * gap
    if distance.elementwise:
        slope = y.sign()
    else:
        square = inner(y, y) + distance.offset**2
        slope = wide(distance.exponent * square ** (distance.exponent / 2 - 1)) * y
    if normalise:
        weight = weight / (x0 - d_phi).abs().flatten(1).mean(1).clamp(min=1e-5).detach()
    return weight * inner(slope, wide(k) * (d_phi - x0 - alpha * gap))


def run(tensors, teacher, critic, weight, k, distance, alpha, normalise, scale=1.0):
    x0, x_t, cond, uncond, raw = tensors
    return projection_cotangents(
        *(x0, x_t, cond, teacher, raw, critic),
        distance=distance,
        alpha=alpha,
        score_scale=k,
        teacher_uncond=uncond,
        guidance_scale=GUIDANCE,
        weight=weight,
        normalise=normalise,
        scale=scale,
    )


def cotangents(result):
    """In the order of `case`'s tensors."""
    return result.x0, result.x_t, result.teacher, result.teacher_uncond, result.critic


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_cotangent_is_autograds(distance, alpha, normalise, backend):
    tensors, *numbers = case()
    options = (DISTANCES[distance], alpha, normalise)
    live = [value.requires_grad_() for value in tensors]
    expected = losses(live, *numbers, *options)
    gradients = torch.autograd.grad(0.5 * expected.sum(), live)
    dtype = torch.float64 if backend == "reference" else torch.float32
    with use_backend(backend):
        stored = [value.detach().to(dtype) for value in live]
        result = run(stored, *numbers, *options, scale=0.5)
    tight = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(result.loss.double(), expected.detach(), **tight)
    for found, gradient in zip(cotangents(result), gradients, strict=True):
        torch.testing.assert_close(found.double(), gradient, **tight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_is_differentiable_in_everything_that_it_reads(backend):
    tensors, *numbers = case()
    live = [value.float().requires_grad_() for value in tensors]
    with use_backend(backend):
        result = run(live, *numbers, Distance.pseudo_huber(0.7), 1.0, False, scale=0.25)
        gradients = torch.autograd.grad((3 * result.loss).sum(), live)
    for found, gradient in zip(cotangents(result), gradients, strict=True):
        torch.testing.assert_close(gradient, 12 * found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_learns_through_noise_and_both_networks(backend):
    """The chain of a real step: renoise, two networks with frozen weights, the loss, backward."""
    torch.manual_seed(0)
    teacher, critic = (torch.nn.Linear(6, 6).requires_grad_(False) for _ in range(2))
    x0 = torch.randn(4, 6, requires_grad=True)
    alpha, sigma = torch.full((4,), 0.8), torch.full((4,), 0.6)
    coefficients = Coefficients(1 / alpha, -sigma / alpha)

    def step() -> torch.Tensor:
        x_t, _ = renoise(x0, alpha, sigma, Noise(1).key("x"), torch.arange(4))
        return projection_cotangents(
            x0, x_t, teacher(x_t), coefficients, critic(x_t), coefficients, alpha=1.2
        ).loss.mean()

    with use_backend("reference"):
        (expected,) = torch.autograd.grad(step(), x0)
    with use_backend(backend):
        (found,) = torch.autograd.grad(step(), x0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_nothing_remains_where_teacher_and_critic_agree(distance, backend):
    """E = 0: the subgradient is 0, also where the distance has a kink there."""
    tensors, teacher, _, weight, k = case()
    x0, x_t, cond, _, _ = (value.float() for value in tensors)
    with use_backend(backend):
        result = projection_cotangents(
            *(x0, x_t, cond, teacher, cond, teacher),
            distance=DISTANCES[distance],
            weight=weight,
            score_scale=k,
        )
    assert result.loss.abs().max() == 0
    assert result.x0.abs().max() == 0
    assert result.dropped.tolist() == [0, 0, 0]
    smooth = distance in ("squared_l2", "pseudo_huber")  # their loss has a slope <E, R> at E = 0
    assert (result.critic.abs().max() > 0) == smooth
    assert result.teacher_uncond is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("poisoned", range(5))
def test_a_sample_that_is_not_finite_is_dropped_alone(poisoned, distance, backend):
    tensors, *numbers = case()
    stored = [value.float() for value in tensors]
    stored[poisoned][1, 0, 0, 3] = float("nan")
    stored[poisoned][2, 1, 2, 3] = float("inf")
    with use_backend(backend):
        result = run(stored, *numbers, DISTANCES[distance], 1.2, True)
    assert result.dropped.tolist() == [0, 1, 1]
    for value in (*cotangents(result), result.loss, result.residual, result.squared_gap):
        assert value[1:].abs().max() == 0
        assert value[0].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_means_over_the_sample(backend):
    tensors, teacher, critic, weight, k = case()
    x0, x_t, cond, uncond, raw = tensors
    with use_backend(backend):
        stored = [value.float() for value in tensors]
        result = run(stored, teacher, critic, weight, k, Distance.squared_l2(), 1.0, False)
    wide = (-1, 1, 1, 1)
    d_phi = teacher.a.view(wide) * x_t
    d_phi = d_phi + teacher.b.view(wide) * (uncond + GUIDANCE * (cond - uncond))
    gap = d_phi - critic.a.view(wide) * x_t - critic.b.view(wide) * raw
    expected = (x0 - d_phi).abs().flatten(1).mean(1), gap.square().flatten(1).mean(1)
    torch.testing.assert_close(result.residual.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(result.squared_gap.double(), expected[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_gaps_survive_bfloat16(backend):
    """Teacher and critic 0.01 apart in bfloat16: E is formed without rounding their denoisers."""
    tensors, teacher, _, weight, k = case((2, 4, 16, 16), gap=0.01)
    stored = [value.bfloat16() for value in tensors]
    arguments = (teacher, teacher, weight, k, Distance.squared_l2(), 1.0, False)
    with use_backend("reference"):
        exact = run([value.double() for value in stored], *arguments)
    with use_backend(backend):
        found = run(stored, *arguments)
    for mine, truth in zip(cotangents(found), cotangents(exact), strict=True):
        error = (mine.double() - truth).norm() / truth.norm()
        assert error < (2**-8 if backend == "triton" else 2e-3)  # the interpreter truncates


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_in_channels_last_out(backend):
    tensors, *numbers = case()
    dense = [value.float() for value in tensors]
    strided = [value.to(memory_format=torch.channels_last) for value in dense]
    arguments = (*numbers, Distance.pseudo_huber(0.7), 1.0, True)
    with use_backend(backend):
        expected, found = run(dense, *arguments), run(strided, *arguments)
        mixed = run([strided[0], *dense[1:]], *arguments)
    for one, two, three in zip(*map(cotangents, (expected, found, mixed)), strict=True):
        assert two.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
        assert torch.equal(three, two)


def test_wrong_input_is_refused():
    tensors, teacher, critic, _weight, k = case()
    x0, x_t, cond, _uncond, raw = tensors
    with pytest.raises(ValueError, match="needs teacher_uncond"):
        projection_cotangents(x0, x_t, cond, teacher, raw, critic, guidance_scale=2.0)
    with pytest.raises(ValueError, match="critic has shape"):
        projection_cotangents(x0, x_t, cond, teacher, raw[:, :1], critic)
    with pytest.raises(ValueError, match="score_scale has shape"):
        projection_cotangents(x0, x_t, cond, teacher, raw, critic, score_scale=k[:2])
    with pytest.raises(ValueError, match=r"not one of Distance\.squared_l2"):
        projection_cotangents(x0, x_t, cond, teacher, raw, critic, distance=Distance(2.0, 0.1))
    with pytest.raises(ValueError, match="not negative"):
        Distance.pseudo_huber(-0.1)
    with pytest.raises(ValueError, match="at least 1"):
        Distance.power(0.5)
