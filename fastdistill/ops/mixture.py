"""`mixture_denoise`: exact denoiser and density of a Gaussian mixture, the analytic teacher.

For data sum_k pi_k N(m_k, diag(lambda_k)) and x = alpha x_0 + sigma eps,

    v_k      = alpha^2 lambda_k + sigma^2                                     elementwise
    l_k      = ln pi_k - 1/2 sum_j [ln(2 pi v_kj) + (x_j - alpha m_kj)^2 / v_kj]
    log p(x) = logsumexp_k l_k,     w = softmax_k l_k
    D(x)     = sum_k w_k D_k,       D_k = m_k + alpha lambda_k / v_k (x - alpha m_k)

and, with s_k = -(x - alpha m_k) / v_k, the gradient of <u, D> + g log p to x, which the projection
losses need (the Jacobian of D is symmetric, arXiv 2404.04057):

    sum_k w_k [alpha lambda_k / v_k u + (<D_k, u> - sum_l w_l <D_l, u> + g) s_k]

Components with lambda = 0 are points: then D is the mean of a data set under its posterior. Spectra
along other axes than the coordinates are reached by rotating x and the means.

Shapes: x [B, ...] with d elements a sample; alpha, sigma [B]; means [K, d]; variances [K, d], or
[K, 1] for isotropic components; log_weights [K]. Bytes moved: x, means and variances twice each,
since the weights need whole samples, D once. All arithmetic is float32 (float64 for float64).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.ops._arguments import check_batch, check_sample, per_sample
from fastdistill.ops._op import Op


class MixtureDenoised(NamedTuple):
    """Result of `mixture_denoise`; densities are float32 (float64 for float64 storage)."""

    denoised: Tensor
    """E[x_0 | x_t]  # [B, ...]"""
    log_density: Tensor
    """log p_t(x_t)  # [B]"""
    posterior: Tensor
    """Probability of each component given x_t  # [B, K]"""


def _components(
    x: Tensor, alpha: Tensor, sigma: Tensor, means: Tensor, variances: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """v_k, alpha lambda_k / v_k and x - alpha m_k, in the compute dtype  # [B, K, d]"""
    compute = torch.promote_types(x.dtype, torch.float32)
    x, means, variances = (
        x.flatten(1).to(compute)[:, None],
        means.to(compute),
        variances.to(compute),
    )
    alpha, sigma = per_sample(alpha, x, compute), per_sample(sigma, x, compute)
    v = alpha**2 * variances + sigma**2
    return v, alpha * variances / v, x - alpha * means


def _reference(
    x: Tensor, alpha: Tensor, sigma: Tensor, means: Tensor, variances: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    v, gain, centred = _components(x, alpha, sigma, means, variances)
    dimensions = means.shape[1]
    volume = (2 * math.pi * v).log().sum(dim=2) * (dimensions // v.shape[2])
    logits = log_weights.to(v.dtype) - 0.5 * (volume + (centred.square() / v).sum(dim=2))
    posterior = logits.softmax(dim=1)
    denoised = (posterior[:, :, None] * (means.to(v.dtype) + gain * centred)).sum(dim=1)
    return denoised.to(x.dtype).reshape(x.shape), logits.logsumexp(dim=1), posterior


def _fake(x: Tensor, alpha: Tensor, sigma: Tensor, means: Tensor, *args: Tensor):
    compute = torch.promote_types(x.dtype, torch.float32)
    shape = (x.shape[0], means.shape[0])
    return (
        torch.empty_like(x),
        x.new_empty(shape[0], dtype=compute),
        x.new_empty(shape, dtype=compute),
    )


def _backward_reference(
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    means: Tensor,
    variances: Tensor,
    posterior: Tensor,
    grad_denoised: Tensor,
    grad_log_density: Tensor,
) -> Tensor:
    v, gain, centred = _components(x, alpha, sigma, means, variances)
    u = grad_denoised.flatten(1).to(v.dtype)[:, None]
    w = posterior.to(v.dtype)
    projected = ((means.to(v.dtype) + gain * centred) * u).sum(dim=2)
    projected = projected - (w * projected).sum(dim=1, keepdim=True)
    pull = w * (projected + grad_log_density.to(v.dtype)[:, None])
    grad = (w[:, :, None] * gain * u - pull[:, :, None] * centred / v).sum(dim=1)
    return grad.to(x.dtype).reshape(x.shape)


_mixture_denoise = Op(
    "mixture_denoise",
    "(Tensor x, Tensor alpha, Tensor sigma, Tensor means, Tensor variances, Tensor log_weights) "
    "-> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    kernel="mixture",
    batch_outputs=3,
    replicated=(3, 4, 5),
)
_mixture_denoise_backward = Op(
    "mixture_denoise_backward",
    "(Tensor x, Tensor alpha, Tensor sigma, Tensor means, Tensor variances, Tensor posterior, "
    "Tensor grad_denoised, Tensor grad_log_density) -> Tensor",
    _backward_reference,
    lambda x, *args: torch.empty_like(x),
    kernel="mixture",
    replicated=(3, 4),
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_denoised: Tensor, grad_log_density: Tensor, _: Tensor):
    args = (*ctx.saved_tensors, grad_denoised.contiguous(), grad_log_density.contiguous())
    return _mixture_denoise_backward.overload(*args), *[None] * 5


_mixture_denoise.register_autograd(_backward, _setup_context)


def mixture_denoise(
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    means: Tensor,
    variances: Tensor,
    log_weights: Tensor | None = None,
) -> MixtureDenoised:
    """Denoiser, log density and posterior of a Gaussian mixture at x_t = alpha x_0 + sigma eps.

    Differentiable in ``x``, once. sigma and the variances must not both be 0.

    Args:
        x: noisy samples [B, ...].
        alpha: signal coefficient of each sample [B].
        sigma: noise coefficient of each sample [B].
        means: mean of each component [K, ...], a sample's shape behind K.
        variances: variances of each component [K, ...], or one for each [K].
        log_weights: normalised log probabilities of the components [K]; uniform if absent.

    Returns:
        `MixtureDenoised`.

    Raises:
        ValueError: for shapes or devices that do not belong together.
    """
    check_sample("x", x)
    check_batch(x, alpha=alpha, sigma=sigma)
    components = means.shape[0]
    if means.shape[1:] != x.shape[1:] or components == 0:
        raise ValueError(
            f"means have shape {tuple(means.shape)}; expected [K, *{tuple(x.shape[1:])}], K > 0"
        )
    if variances.shape not in ((components,), means.shape):
        raise ValueError(
            f"variances have shape {tuple(variances.shape)}; expected [{components}] or that of "
            f"means, {tuple(means.shape)}"
        )
    if log_weights is None:
        compute = torch.promote_types(means.dtype, torch.float32)
        log_weights = means.new_full((components,), -math.log(components), dtype=compute)
    if log_weights.shape != (components,):
        raise ValueError(
            f"log_weights have shape {tuple(log_weights.shape)}; expected [{components}]"
        )
    for name, value in {"means": means, "variances": variances, "weights": log_weights}.items():
        if value.device != x.device:
            raise ValueError(f"{name} are on {value.device}; expected {x.device}, as x is")
    args = (means.flatten(1).contiguous(), variances.reshape(components, -1).contiguous())
    return MixtureDenoised(*_mixture_denoise(x.contiguous(), alpha, sigma, *args, log_weights))
