"""`mixture_denoise` beside broadcast torch and, for isotropic components, matrix products.

The eager reference makes tensors of [B, K, d]. Where each component has one variance, a squared
distance is a matrix product, which is how a careful user writes it; with a variance for every
coordinate and a noise level for every sample there is no such form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import OURS, Case, Judge, Results, near
from bench.inputs import draw, in_float64, noise_level
from bench.peers import calls, reference_peers
from fastdistill.ops import mixture_denoise
from fastdistill.ops.mixture import _mixture_denoise

# (batch, components, elements, one variance a component): a class-conditional teacher with a
# spectrum a class, and a data set of points blurred alike.
SIZES = ((64, 10, 12288, False), (64, 100, 3072, True), (8, 10, 65536, False))
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


class Inputs(NamedTuple):
    """One set: noisy samples with their noise levels, and the mixture."""

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    means: Tensor
    variances: Tensor
    log_weights: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    sizes = ((2, 3, 48, False), (2, 3, 48, True)) if small else SIZES
    return (_case(*size, dtype, device) for dtype in TOLERANCE for size in sizes)


def _case(
    batch: int, components: int, d: int, isotropic: bool, dtype: torch.dtype, device: torch.device
) -> Case:
    alpha, sigma = (value.float() for value in noise_level(batch, device))
    log_weights = torch.full((components,), -math.log(components), device=device)
    width = 1 if isotropic else d

    def make(generator: torch.Generator) -> Inputs:
        """Means so near to each other that several components share a sample."""
        x = draw((batch, d), dtype, generator)
        means = draw((components, d), torch.float32, generator) / d**0.5
        variances = 0.5 + torch.rand((components, width), generator=generator, device=device) / (
            d**0.5
        )
        return Inputs(x, alpha, sigma, means, variances, log_weights)

    def ours(x: Tensor, alpha: Tensor, sigma: Tensor, means: Tensor, *rest: Tensor) -> Results:
        return mixture_denoise(x, alpha, sigma, means, rest[0].squeeze(1), rest[1])

    def judge(inputs: Inputs) -> Judge:
        return near(_mixture_denoise.reference(*in_float64(inputs))[:2], TOLERANCE[dtype])

    parameters = 4 * components * (d + width)
    kind = "isotropic" if isotropic else "diagonal"
    variants = {OURS: calls(ours, tuple, keep=2)}
    if isotropic:
        variants["eager, matrix products"] = calls(_by_products, tuple)
    return Case(
        *("mixture_denoise", f"{batch}x{d}, {components} {kind}", dtype),
        bytes_moved=2 * parameters + 3 * batch * d * dtype.itemsize,
        make=make,
        variants=variants
        | reference_peers(_mixture_denoise.reference, tuple, device.type == "cuda", keep=2),
        judge=judge,
    )


def _by_products(
    x: Tensor, alpha: Tensor, sigma: Tensor, means: Tensor, variances: Tensor, log_weights: Tensor
) -> Results:
    """Squared distances as |x|^2 - 2 alpha x m + alpha^2 |m|^2."""
    wide, a, variances = x.float(), alpha[:, None], variances[:, 0]
    v = a.square() * variances + sigma.square()[:, None]
    square = wide.square().sum(dim=1, keepdim=True) + a.square() * means.square().sum(dim=1)
    square = square - 2 * a * (wide @ means.T)
    logits = log_weights - 0.5 * (x.shape[1] * (2 * math.pi * v).log() + square / v)
    posterior, gain = logits.softmax(dim=1), a * variances / v
    of_means = posterior * (1 - gain * a)
    denoised = of_means @ means + (posterior * gain).sum(dim=1, keepdim=True) * wide
    return denoised.to(x.dtype), logits.logsumexp(dim=1)
