"""Exact denoiser, density and posterior of a Gaussian mixture, and the gradient, in three launches.

The first gives each program a few components of one sample and walks along the sample. Programs of
the same components and different samples are neighbours, so that means and variances come from
memory once and from the cache for the rest of the batch. The second is a program a sample over all
components. The third gives each program a piece of one sample and walks along the components. Every
sum has a fixed order.

Bytes moved: x, means and variances twice, B K numbers four times, the result once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import (
    check_storage,
    load_block,
    load_number,
    on_device_of,
    target,
)

# Components x elements at once, 16 a thread. Along a sample a thread has 8 elements of a component,
# 128 bits of the narrowest dtype; pieces are narrow, so that a small batch has enough programs.
_ALONG_SAMPLE, _COLUMNS = 1_024, 1_024  # 2,048 spill two registers on some targets
_ALONG_COMPONENTS, _PIECE = 4_096, 128
_ROW = 4_096  # components of one sample at once
_LOWEST = tl.constexpr(-3.4e38)
_TURN = tl.constexpr(2 * math.pi)


@triton.jit
def _components(
    x,
    alpha,
    sigma,
    means_ptr,
    variances_ptr,
    components,
    first,
    column,
    ISOTROPIC: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """v_k, alpha lambda_k / v_k, m_k and x - alpha m_k of a tile [ROWS, COLUMNS], and its mask."""
    row, lane = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    real = row < components - first
    exists = real[:, None] & (lane < N)[None, :]
    start = first * tl.full([], N, tl.int64)
    offset = row[:, None] * N + lane[None, :]
    m = tl.load(means_ptr + start + offset, mask=exists, other=0.0).to(tl.float32)
    if ISOTROPIC:
        variance = tl.load(variances_ptr + first + row, mask=real, other=1.0)[:, None]
    else:
        variance = tl.load(variances_ptr + start + offset, mask=exists, other=1.0)
    variance = variance.to(tl.float32)
    v = alpha * alpha * variance + sigma * sigma
    return v, alpha * variance / v, m, x[None, :] - alpha * m, exists


@triton.jit(do_not_specialize=["batch", "components"])
def _along_sample_kernel(
    x_ptr,
    alpha_ptr,
    sigma_ptr,
    means_ptr,
    variances_ptr,
    log_weights_ptr,
    u_ptr,
    out_ptr,
    batch,
    components,
    ISOTROPIC: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # out[i, k] = ln pi_k - 1/2 sum_j [ln(2 pi v_kj) + (x_j - alpha m_kj)^2 / v_kj],   or, with u,
    # out[i, k] = <m_k + alpha lambda_k / v_k (x - alpha m_k), u>
    i = (tl.program_id(0) % batch).to(tl.int64)
    first = tl.program_id(0) // batch * ROWS
    alpha, sigma = load_number(alpha_ptr, i), load_number(sigma_ptr, i)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for column in range(0, N, COLUMNS):
        lane = column + tl.arange(0, COLUMNS)
        x = load_block(x_ptr, i * N, lane, lane < N)
        v, gain, m, centred, exists = _components(
            x, alpha, sigma, means_ptr, variances_ptr, components, first, column,
            ISOTROPIC, N, ROWS, COLUMNS,
        )  # fmt: skip
        if u_ptr is not None:
            term = (m + gain * centred) * load_block(u_ptr, i * N, lane, lane < N)[None, :]
        elif ISOTROPIC:
            term = centred * centred / v
        else:
            term = centred * centred / v + tl.log(v * _TURN)
        total += tl.where(exists, term, 0.0)
    result = tl.sum(total, axis=1)
    row = tl.arange(0, ROWS)
    real = row < components - first
    if u_ptr is None:
        if ISOTROPIC:
            variance = tl.load(variances_ptr + first + row, mask=real, other=1.0).to(tl.float32)
            result += N * tl.log((alpha * alpha * variance + sigma * sigma) * _TURN)
        weights = tl.load(log_weights_ptr + first + row, mask=real, other=0.0).to(tl.float32)
        result = weights - 0.5 * result
    tl.store(out_ptr + i * components + first + row, result, mask=real)


@triton.jit(do_not_specialize=["components"])
def _posterior_kernel(logits_ptr, log_density_ptr, components, ROW: tl.constexpr):
    # log p = logsumexp_k l_k,   w = softmax_k l_k in the place of l
    i = tl.program_id(0).to(tl.int64)
    row = logits_ptr + i * components
    greatest, total = tl.full([], _LOWEST, tl.float32), tl.full([], 0.0, tl.float32)
    for first in range(0, components, ROW):
        k = first + tl.arange(0, ROW)
        logit = tl.load(row + k, mask=k < components, other=-float("inf"))
        greater = tl.maximum(greatest, tl.max(logit))
        total = total * tl.exp(greatest - greater) + tl.sum(tl.exp(logit - greater))
        greatest = greater
    tl.store(log_density_ptr + i, greatest + tl.log(total))
    for first in range(0, components, ROW):
        k = first + tl.arange(0, ROW)
        logit = tl.load(row + k, mask=k < components, other=-float("inf"))
        tl.store(row + k, tl.exp(logit - greatest) / total, mask=k < components)


@triton.jit(do_not_specialize=["components"])
def _pull_kernel(projected_ptr, posterior_ptr, grad_ptr, components, ROW: tl.constexpr):
    # w_k (<D_k, u> - sum_l w_l <D_l, u> + g) in the place of <D_k, u>
    i = tl.program_id(0).to(tl.int64)
    row = projected_ptr + i * components
    mean = tl.full([], 0.0, tl.float32)
    for first in range(0, components, ROW):
        k = first + tl.arange(0, ROW)
        w = load_block(posterior_ptr, i * components, k, k < components)
        mean += tl.sum(w * tl.load(row + k, mask=k < components, other=0.0))
    excess = load_number(grad_ptr, i) - mean
    for first in range(0, components, ROW):
        k = first + tl.arange(0, ROW)
        w = load_block(posterior_ptr, i * components, k, k < components)
        pull = w * (tl.load(row + k, mask=k < components, other=0.0) + excess)
        tl.store(row + k, pull, mask=k < components)


@triton.jit(do_not_specialize=["components"])
def _along_components_kernel(
    x_ptr,
    alpha_ptr,
    sigma_ptr,
    means_ptr,
    variances_ptr,
    posterior_ptr,
    pull_ptr,
    u_ptr,
    out_ptr,
    components,
    ISOTROPIC: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):
    # out[i] = sum_k w_k (m_k + alpha lambda_k / v_k (x - alpha m_k)),   or, with u,
    # out[i] = sum_k w_k alpha lambda_k / v_k u - pull_k (x - alpha m_k) / v_k
    i = (tl.program_id(0) // PIECES).to(tl.int64)
    column = tl.program_id(0) % PIECES * COLUMNS
    alpha, sigma = load_number(alpha_ptr, i), load_number(sigma_ptr, i)
    lane = column + tl.arange(0, COLUMNS)
    x = load_block(x_ptr, i * N, lane, lane < N)
    if u_ptr is not None:
        u = load_block(u_ptr, i * N, lane, lane < N)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, components, ROWS):
        v, gain, m, centred, exists = _components(
            x, alpha, sigma, means_ptr, variances_ptr, components, first, column,
            ISOTROPIC, N, ROWS, COLUMNS,
        )  # fmt: skip
        k = first + tl.arange(0, ROWS)
        w = load_block(posterior_ptr, i * components, k, k < components)[:, None]
        if u_ptr is not None:
            pull = load_block(pull_ptr, i * components, k, k < components)[:, None]
            term = w * gain * u[None, :] - pull * (centred / v)
        else:
            term = w * (m + gain * centred)
        total += tl.where(exists, term, 0.0)
    result = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i * N + lane, result, mask=lane < N)


def _warps(tile: int) -> int:
    return max(1, tile // (16 * target().warp_size))


def _shape(components: int, elements: int, tile: int, columns: int) -> dict[str, int]:
    """Components x elements of a tile, and its warps."""
    columns = min(triton.next_power_of_2(elements), columns)
    rows = min(triton.next_power_of_2(components), tile // columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": _warps(rows * columns)}


def _row(components: int) -> dict[str, int]:
    """Components of a block, and its warps."""
    block = min(triton.next_power_of_2(components), _ROW)
    return {"ROW": block, "num_warps": _warps(block)}


def _along_sample(mixture, log_weights, u, out) -> None:
    means, variances = mixture[3], mixture[4]
    (batch, components), elements = out.shape, means.shape[1]
    shape = _shape(components, elements, _ALONG_SAMPLE, _COLUMNS)
    _along_sample_kernel[(batch * triton.cdiv(components, shape["ROWS"]),)](
        *mixture,
        log_weights,
        u,
        out,
        batch,
        components,
        ISOTROPIC=variances.shape[1] != elements,
        N=elements,
        enable_fp_fusion=True,
        **shape,
    )


def _along_components(mixture, posterior, pull, u, out) -> None:
    means, variances = mixture[3], mixture[4]
    (batch, components), elements = posterior.shape, means.shape[1]
    shape = _shape(components, elements, _ALONG_COMPONENTS, _PIECE)
    pieces = triton.cdiv(elements, shape["COLUMNS"])
    _along_components_kernel[(batch * pieces,)](
        *mixture,
        posterior,
        pull,
        u,
        out,
        components,
        ISOTROPIC=variances.shape[1] != elements,
        N=elements,
        PIECES=pieces,
        enable_fp_fusion=True,
        **shape,
    )


def mixture_denoise(
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    means: torch.Tensor,
    variances: torch.Tensor,
    log_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::mixture_denoise`, as `fastdistill.ops.mixture_denoise`."""
    log_weights = log_weights.contiguous()
    check_storage(x=x, means=means, variances=variances, log_weights=log_weights)
    batch, components = x.shape[0], means.shape[0]
    denoised = torch.empty_like(x)
    log_density = x.new_empty(batch, dtype=torch.float32)
    posterior = x.new_empty(batch, components, dtype=torch.float32)
    if batch == 0:
        return denoised, log_density, posterior
    mixture = (x, alpha.contiguous(), sigma.contiguous(), means, variances)
    with on_device_of(x):
        _along_sample(mixture, log_weights, None, posterior)
        _posterior_kernel[(batch,)](
            posterior, log_density, components, enable_fp_fusion=True, **_row(components)
        )
        _along_components(mixture, posterior, None, None, denoised)
    return denoised, log_density, posterior


def mixture_denoise_backward(
    x: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    means: torch.Tensor,
    variances: torch.Tensor,
    posterior: torch.Tensor,
    grad_denoised: torch.Tensor,
    grad_log_density: torch.Tensor,
) -> torch.Tensor:
    """Launch `fastdistill::mixture_denoise_backward`, the gradient of the above to ``x``."""
    check_storage(x=x, means=means, variances=variances, posterior=posterior)
    check_storage(grad_denoised=grad_denoised)
    batch, components = x.shape[0], means.shape[0]
    grad = torch.empty_like(x)
    if batch == 0:
        return grad
    mixture = (x, alpha.contiguous(), sigma.contiguous(), means, variances)
    pull = torch.empty_like(posterior, dtype=torch.float32)
    with on_device_of(x):
        _along_sample(mixture, None, grad_denoised, pull)
        _pull_kernel[(batch,)](
            pull,
            posterior,
            grad_log_density.contiguous(),
            components,
            enable_fp_fusion=True,
            **_row(components),
        )
        _along_components(mixture, posterior, pull, grad_denoised, grad)
    return grad
