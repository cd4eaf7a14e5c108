"""`matching_cotangent` beside the eager chains of FastGen and DMD2, and torch.compile.

The rivals do what those engines do: convert three raw epsilon outputs to x0 in float64, guide,
normalise, form a pseudo-target, and let autograd differentiate an MSE.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case
from fastdistill.diffusion import Epsilon
from fastdistill.ops import matching_cotangent
from fastdistill.ops.matching import _matching_cotangent

GUIDANCE = 7.5


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


def _x0(x_t: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Epsilon to x0 in float64, rounded back."""
    x64, eps64 = x_t.double(), eps.double()
    return ((x64 - _wide(sigma, x_t) * eps64) / _wide(alpha, x_t)).to(x_t.dtype)


def fastgen(x: Tensor, x_t: Tensor, cond: Tensor, uncond: Tensor, critic: Tensor, *level: Tensor):
    """FastGen's student tail: x0 of each network, guidance, float32 weight, MSE by autograd."""
    x = x.detach().requires_grad_()
    with torch.no_grad():
        fake, real, negative = (_x0(x_t, eps, *level) for eps in (critic, cond, uncond))
        real = real + (GUIDANCE - 1) * (real - negative)
        dims = tuple(range(1, x.ndim))
        distance = (x.float() - real.float()).abs().mean(dim=dims, keepdim=True)
        gradient = (fake - real) * (1 / (distance + 1e-6)).to(x.dtype)
        target = x - gradient
    loss = 0.5 * F.mse_loss(x, target)
    loss.backward()
    assert x.grad is not None
    return x.grad


def dmd2(x: Tensor, x_t: Tensor, cond: Tensor, uncond: Tensor, critic: Tensor, *level: Tensor):
    """DMD2's SDXL tail: everything in float64, nan_to_num, MSE by autograd."""
    alpha, sigma = level
    x = x.detach().requires_grad_()
    with torch.no_grad():
        guided = uncond + GUIDANCE * (cond - uncond)
        a, s = _wide(alpha, x_t), _wide(sigma, x_t)
        fake = (x_t.double() - s * critic.double()) / a
        real = (x_t.double() - s * guided.double()) / a
        p_real = x.double() - real
        p_fake = x.double() - fake
        dims = tuple(range(1, x.ndim))
        gradient = (p_real - p_fake) / p_real.abs().mean(dim=dims, keepdim=True)
        gradient = torch.nan_to_num(gradient)
    loss = 0.5 * F.mse_loss(x.double(), (x.double() - gradient).detach())
    loss.backward()
    assert x.grad is not None
    return x.grad


def make_case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """All variants on one set of inputs."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(5)]
    x, x_t, cond, uncond, critic = tensors
    sigma = torch.linspace(0.3, 0.9, shape[0], dtype=torch.float64)
    alpha = (1 - sigma**2).sqrt()
    coefficients = Epsilon().coefficients(alpha.float(), sigma.float())
    exact_coefficients = Epsilon().coefficients(alpha, sigma)
    scale = 1 / shape[0]
    arguments = (
        *(x, x_t, cond, *coefficients, critic, *coefficients, uncond, GUIDANCE),
        *(None, 0.0, None, True, scale, dtype),
    )
    compiled = torch.compile(_matching_cotangent.reference, dynamic=False)

    def ours() -> Tensor:
        return matching_cotangent(
            x,
            x_t,
            cond,
            coefficients,
            critic,
            coefficients,
            teacher_uncond=uncond,
            guidance_scale=GUIDANCE,
            scale=scale,
        ).cotangent

    exact, _ = _matching_cotangent.reference(
        *(value.double() for value in (x, x_t, cond)),
        *exact_coefficients,
        critic.double(),
        *exact_coefficients,
        uncond.double(),
        GUIDANCE,
        *(None, 0.0, None, True, scale, torch.float64),
    )
    return Case(
        "matching_cotangent",
        shape,
        dtype,
        6 * x.numel() * x.element_size(),
        {
            "fastdistill": ours,
            "eager, as FastGen": lambda: fastgen(x, x_t, cond, uncond, critic, alpha, sigma),
            "eager, as DMD2": lambda: dmd2(x, x_t, cond, uncond, critic, alpha, sigma),
            "torch.compile": lambda: compiled(*arguments)[0],
        },
        exact,
    )
