"""`renoise` beside the eager chains of FastGen and DMD2, and torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness import Case
from fastdistill.diffusion import Noise
from fastdistill.ops import renoise
from fastdistill.ops.renoise import _renoise


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


def fastgen(x0: Tensor, alpha: Tensor, sigma: Tensor, c_in: Tensor) -> Tensor:
    """FastGen: noise, the forward process in float64, the scaled input."""
    eps = torch.randn_like(x0)
    x_t = (_wide(alpha, x0) * x0.double() + _wide(sigma, x0) * eps.double()).to(x0.dtype)
    return (_wide(c_in, x0) * x_t).to(x0.dtype)


def dmd2(x0: Tensor, alpha: Tensor, sigma: Tensor, c_in: Tensor) -> Tensor:
    """DMD2: diffusers' add_noise in the samples' own dtype, the scaled input."""
    eps = torch.randn_like(x0)
    x_t = _wide(alpha, x0).to(x0.dtype) * x0 + _wide(sigma, x0).to(x0.dtype) * eps
    return _wide(c_in, x0).to(x0.dtype) * x_t


def make_case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """All variants on one set of inputs; their noise differs, so only ours has a reference."""
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    sigma = torch.linspace(0.3, 0.9, shape[0])
    alpha, c_in = (1 - sigma**2).sqrt(), (1 + sigma**2).rsqrt()
    key, index = Noise(0).key("bench"), torch.arange(shape[0])
    arguments = (x0, alpha, sigma, key, index, c_in, dtype)
    exact = _renoise.reference(*(x0.double(), *arguments[1:6]), torch.float64)[1]
    found = _renoise(*arguments)[1].double()
    assert (found - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()
    compiled = torch.compile(_renoise.reference, dynamic=False)
    compiled_chain = torch.compile(dmd2, dynamic=False)
    return Case(
        "renoise",
        shape,
        dtype,
        3 * x0.numel() * x0.element_size(),
        {
            "fastdistill": lambda: renoise(*arguments).model_input,
            "eager, as FastGen": lambda: fastgen(x0, alpha, sigma, c_in),
            "eager, as DMD2": lambda: dmd2(x0, alpha, sigma, c_in),
            "torch.compile": lambda: compiled(*arguments)[1],
            "torch.compile, torch's own noise": lambda: compiled_chain(x0, alpha, sigma, c_in),
        },
        None,
    )
