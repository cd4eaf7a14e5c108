"""Losses for other people's loops: what torch's autograd gives for the papers' own formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdistill.functional import consistency_loss, score_projection_loss
from fastdistill.ops import Distance


def level(count):
    sigma = torch.linspace(0.4, 0.9, count)
    return (1 - sigma**2).sqrt(), sigma


def wide(value):
    return value.view(-1, 1, 1, 1)


def draw(seed, count=3):
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def frozen(seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1))
    return network.requires_grad_(False)


SIZES = {"squared L2": (2.0, 0.0), "pseudo-Huber": (1.0, 0.3)}


@pytest.mark.parametrize("distance", SIZES)
@pytest.mark.parametrize("of_scores", [False, True])
def test_projection_is_differentiated_through_both_networks(distance, of_scores):
    """SIM: <d'(k E), k (D_phi - x0 - E)> with E = D_phi - D_psi, all by autograd."""
    exponent, offset = SIZES[distance]
    alpha, sigma = level(3)
    teacher, critic = frozen(0), frozen(1)

    def gradient(loss_of):
        sample = draw(2).requires_grad_()
        x_t = wide(alpha) * sample + wide(sigma) * draw(3)
        loss = loss_of(sample, x_t, teacher(x_t), critic(x_t))
        return loss.detach(), torch.autograd.grad(loss, sample)[0]

    def by_autograd(sample, x_t, eps, fake_eps):
        real, fake = ((x_t - wide(sigma) * e) / wide(alpha) for e in (eps, fake_eps))
        k = wide(alpha / sigma**2) if of_scores else 1.0
        y = k * (real - fake)
        square = y.square().sum((1, 2, 3), keepdim=True) + offset**2
        slope = exponent * square ** (exponent / 2 - 1) * y
        return (slope * k * (fake - sample)).sum((1, 2, 3)).mean()

    def ours(sample, x_t, eps, fake_eps):
        return score_projection_loss(
            *(sample, x_t, eps, fake_eps, alpha, sigma),
            distance=Distance(exponent, offset),
            of_scores=of_scores,
        )

    for found, expected in zip(gradient(ours), gradient(by_autograd), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_sid_has_its_coefficient_normaliser_and_guidance():
    """SiD: E (D_phi - x0 - a E) / sg(mean |x0 - D_phi|), summed over the sample, with weight 1."""
    alpha, sigma = level(3)
    teacher, critic, other = frozen(0), frozen(1), frozen(2)
    gradients = []
    for fused in (True, False):
        sample = draw(2).requires_grad_()
        x_t = wide(alpha) * sample + wide(sigma) * draw(3)
        eps, uncond, fake_eps = teacher(x_t), other(x_t), critic(x_t)
        if fused:
            loss = score_projection_loss(
                *(sample, x_t, eps, fake_eps, alpha, sigma),
                sid_alpha=1.2,
                teacher_output_uncond=uncond,
                guidance_scale=3.0,
                weight=torch.full((3,), 0.5),
                normalise=True,
            )
        else:
            guided = uncond + 3.0 * (eps - uncond)
            real, fake = ((x_t - wide(sigma) * e) / wide(alpha) for e in (guided, fake_eps))
            gap = real - fake
            size = (sample - real).abs().mean((1, 2, 3), keepdim=True).detach()
            loss = (gap * (real - sample - 1.2 * gap) / size).sum((1, 2, 3)).mean()
        gradients.append(torch.autograd.grad(loss, sample)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def edm(raw, x_t, sigma):
    total = wide(sigma) ** 2 + 0.25
    return 0.25 / total * x_t + wide(sigma) * 0.5 * total.rsqrt() * raw


@pytest.mark.parametrize("raw_target", [False, True])
def test_consistency_is_a_pseudo_huber_distance_of_whole_samples(raw_target):
    """With iCT's constant 0.00054 sqrt(N), and 1 / (t - r) as the weight."""
    late, early, one = torch.tensor([0.7, 2.0, 9.0]), torch.tensor([0.5, 1.5, 8.0]), torch.ones(3)
    sample, noise = draw(4), draw(5)
    x_t, x_r = (sample + wide(sigma) * noise for sigma in (late, early))
    raw_r, weight, c = draw(6), 1 / (late - early), 0.00054 * 32**0.5
    target = edm(raw_r, x_r, early)
    earlier = {"target_x_t": x_r, "target_alpha": one, "target_sigma": early}

    raw = draw(7).requires_grad_()
    loss = consistency_loss(
        *(raw, raw_r if raw_target else target, x_t, one, late),
        weight=weight,
        **(earlier if raw_target else {}),
    )
    gap = (edm(raw, x_t, late) - target).square().sum((1, 2, 3))
    expected = (weight * ((gap + c**2).sqrt() - c)).mean()
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value, raw)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_a_part_of_the_earlier_time_is_refused():
    one = torch.ones(3)
    with pytest.raises(ValueError, match="belong together: give all where target is a raw output"):
        consistency_loss(draw(1), draw(2), draw(3), one, one, target_x_t=draw(4))


def test_both_compile_without_a_graph_break():
    alpha, sigma = level(3)

    def losses(sample, x_t, eps, fake_eps):
        return (
            score_projection_loss(sample, x_t, eps, fake_eps, alpha, sigma),
            consistency_loss(eps, sample, x_t, alpha, sigma),
        )

    torch._dynamo.reset()
    tensors = [draw(seed) for seed in range(4)]
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*tensors), losses(*tensors), strict=True):
        torch.testing.assert_close(found, expected)
