"""`gaussian_transport`: the exact diffusion of a Gaussian, as one affine map.

For data N(mu, U diag(lambda) U^T + floor (I - U U^T)), with U [d, r] orthonormal, the denoiser and
the probability-flow ODE are affine in x_t (arXiv 2412.09726). Both are

    c = U^T (x - shift mu)
    y = mean_gain mu + rest_gain (x - shift mu) + U ((gains - rest_gain) * c)

with, from (alpha, sigma) to (alpha', sigma'),

    transport:  mean_gain = alpha',  gain(lambda) = sqrt((alpha'^2 lambda + sigma'^2) /
                                                         (alpha^2 lambda + sigma^2))
    denoiser:   mean_gain = 1,       gain(lambda) = alpha lambda / (alpha^2 lambda + sigma^2)

where shift = alpha, gains = gain(lambda_j) and rest_gain = gain(floor). Two maps of one x share c.

Shapes: x [B, ...] with d elements a sample; mean [d], basis [d, r], shift, mean_gain and rest_gain
[B], gains [B, r]. Factors of products are rounded to the basis's dtype and accumulated in float32:
a 16-bit basis is half the bytes. Bytes moved: x and the basis once for c and once for the result,
each result once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.ops._arguments import check_batch, check_sample
from fastdistill.ops._op import Op


class Transported(NamedTuple):
    """Result of `gaussian_transport`."""

    x: Tensor
    """The sample at (alpha', sigma')  # [B, ...]"""
    denoised: Tensor | None
    """E[x_0 | x_t] at (alpha, sigma), where it was asked for  # [B, ...]"""


def _reference(
    x: Tensor,
    mean: Tensor,
    basis: Tensor,
    shift: Tensor,
    mean_gain: Tensor,
    rest_gain: Tensor,
    gains: Tensor,
    second_mean_gain: Tensor | None,
    second_rest_gain: Tensor | None,
    second_gains: Tensor | None,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    mu, u = mean.to(compute), basis.to(compute)
    centred = x.flatten(1).to(compute) - shift.to(compute)[:, None] * mu
    c = centred @ u

    def image(mean_gain: Tensor, rest_gain: Tensor, gains: Tensor) -> Tensor:
        rest = rest_gain.to(compute)[:, None]
        y = mean_gain.to(compute)[:, None] * mu + rest * centred
        return (y + ((gains.to(compute) - rest) * c) @ u.T).to(x.dtype).reshape(x.shape)

    first = image(mean_gain, rest_gain, gains)
    if second_mean_gain is None or second_rest_gain is None or second_gains is None:
        return first, x.new_empty(x.shape[0], 0)
    return first, image(second_mean_gain, second_rest_gain, second_gains)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], 0) if args[-1] is None else x.new_empty(
        x.shape
    )


_gaussian_transport = Op(
    "gaussian_transport",
    "(Tensor x, Tensor mean, Tensor basis, Tensor shift, Tensor mean_gain, Tensor rest_gain, "
    "Tensor gains, Tensor? second_mean_gain, Tensor? second_rest_gain, Tensor? second_gains) "
    "-> (Tensor, Tensor)",
    _reference,
    _fake,
    kernel="gaussian",
    batch_outputs=2,
    replicated=(1, 2),
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[1:3], *inputs[4:7], *inputs[8:])


def _backward(ctx: Any, grad: Tensor, second_grad: Tensor):
    """The maps are symmetric: each gradient passes through its own map without the mean."""
    mean, basis, _, rest_gain, gains, second_rest_gain, second_gains = ctx.saved_tensors
    zero = torch.zeros_like(rest_gain)

    def transposed(grad: Tensor, rest_gain: Tensor, gains: Tensor) -> Tensor:
        no_second = (None, None, None)
        args = (grad.contiguous(), mean, basis, zero, zero, rest_gain, gains, *no_second)
        return _gaussian_transport.overload(*args)[0]

    result = transposed(grad, rest_gain, gains)
    if second_gains is not None:
        result = result + transposed(second_grad, second_rest_gain, second_gains)
    return result, *[None] * 9


_gaussian_transport.register_autograd(_backward, _setup_context)


def _check(x: Tensor, mean: Tensor, basis: Tensor, spectrum: Tensor, floor: float) -> None:
    check_sample("x", x)
    elements = x.shape[1:].numel()
    if mean.numel() != elements or basis.shape != (elements, len(spectrum)) or spectrum.ndim != 1:
        raise ValueError(
            f"mean {tuple(mean.shape)}, basis {tuple(basis.shape)} and spectrum "
            f"{tuple(spectrum.shape)} do not fit samples of {elements} elements; expected "
            f"[{elements}], [{elements}, r] and [r]"
        )
    for name, value in {"mean": mean, "basis": basis, "spectrum": spectrum}.items():
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}; expected {x.device}, as x is")
    if not floor >= 0:
        raise ValueError(f"floor is {floor}; expected a variance, not negative")


Gain = Callable[[Tensor | float], Tensor]


def _map(mean_gain: Tensor, gain: Gain, spectrum: Tensor, floor: float) -> tuple[Tensor, ...]:
    """The three numbers of a map: mean_gain [B], rest_gain [B] and gains [B, r]."""
    return mean_gain, gain(floor)[:, 0], gain(spectrum)


def _denoiser(alpha: Tensor, sigma: Tensor) -> Gain:
    a, s = alpha[:, None], sigma[:, None]
    return lambda variance: a * variance / (a**2 * variance + s**2)


def _transport(alpha: Tensor, sigma: Tensor, to_alpha: Tensor, to_sigma: Tensor) -> Gain:
    a, s, to_a, to_s = (value[:, None] for value in (alpha, sigma, to_alpha, to_sigma))
    return lambda variance: ((to_a**2 * variance + to_s**2) / (a**2 * variance + s**2)).sqrt()


def _affine(
    x: Tensor, mean: Tensor, basis: Tensor, alpha: Tensor, *maps: Tensor
) -> tuple[Tensor, Tensor]:
    absent = [None] * (6 - len(maps))
    return _gaussian_transport(
        x.contiguous(), mean.reshape(-1).contiguous(), basis.contiguous(), alpha, *maps, *absent
    )


def _levels(spectrum: Tensor, *levels: Tensor) -> list[Tensor]:
    """Spectrum and noise levels in the dtype that gains are formed in."""
    compute = torch.promote_types(spectrum.dtype, torch.float32)
    return [value.to(compute) for value in (spectrum, *levels)]


def gaussian_transport(
    x: Tensor,
    mean: Tensor,
    basis: Tensor,
    spectrum: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    to_alpha: Tensor,
    to_sigma: Tensor,
    floor: float = 0.0,
    denoise: bool = False,
) -> Transported:
    """Carry samples along a Gaussian's probability-flow ODE from one noise level to another.

    Differentiable in ``x``. sigma and the variances must not both be 0.

    Args:
        x: samples at (alpha, sigma) [B, ...].
        mean: mean of the data, as many elements as a sample has.
        basis: orthonormal principal directions [d, r].
        spectrum: variances of the data along them [r].
        alpha: signal coefficient of each sample [B].
        sigma: noise coefficient of each sample [B].
        to_alpha: signal coefficient to go to [B].
        to_sigma: noise coefficient to go to [B].
        floor: variance of the data in all directions that the basis leaves out.
        denoise: also return E[x_0 | x_t] at (alpha, sigma), from the same projection.

    Returns:
        `Transported`.

    Raises:
        ValueError: for shapes or devices that do not belong together, and a negative floor.
    """
    _check(x, mean, basis, spectrum, floor)
    check_batch(x, alpha=alpha, sigma=sigma, to_alpha=to_alpha, to_sigma=to_sigma)
    variances, *levels = _levels(spectrum, alpha, sigma, to_alpha, to_sigma)
    maps = _map(to_alpha, _transport(*levels), variances, floor)
    if denoise:
        maps += _map(torch.ones_like(alpha), _denoiser(*levels[:2]), variances, floor)
    moved, denoised = _affine(x, mean, basis, alpha, *maps)
    return Transported(moved, denoised if denoise else None)


def gaussian_denoise(
    x: Tensor,
    mean: Tensor,
    basis: Tensor,
    spectrum: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    floor: float = 0.0,
) -> Tensor:
    """E[x_0 | x_t] for Gaussian data: the exact denoiser; arguments as `gaussian_transport`'s.

    Raises:
        ValueError: for shapes or devices that do not belong together, and a negative floor.
    """
    _check(x, mean, basis, spectrum, floor)
    check_batch(x, alpha=alpha, sigma=sigma)
    variances, *levels = _levels(spectrum, alpha, sigma)
    one_map = _map(torch.ones_like(alpha), _denoiser(*levels), variances, floor)
    return _affine(x, mean, basis, alpha, *one_map)[0]
