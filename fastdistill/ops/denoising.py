"""`denoising_cotangent`: the weighted denoising score-matching loss and its gradient, in one pass.

    D         = a * x_t + b * F            F raw network output, (a, b) its parametrisation
    loss_i    = weight_i * mean((D - x0)^2)          mean over the elements of sample i
    cotangent = scale * d loss_i / dF
              = scale * 2 * weight_i * b_i * (D - x0) / N

A loss in another space is the same with another weight: (alpha / sigma)^2 for
epsilon, ((alpha^2 + sigma^2) / sigma)^2 for v, ((alpha + sigma) / sigma)^2 for the flow velocity;
see `fastdistill.diffusion.loss_weight`.

Shapes: F, x0, x_t [B, ...]; a, b, weight [B]. Bytes moved: F, x0 and x_t read once, the cotangent
written once. All arithmetic is float32 whatever the storage (float64 for float64 storage).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.ops._arguments import (
    Coefficients,
    Layout,
    check_batch,
    check_like,
    check_sample,
    check_scale,
    elements_per_sample,
    mean_over_sample,
    per_sample,
)
from fastdistill.ops._op import Op


class DenoisingCotangent(NamedTuple):
    """Result of `denoising_cotangent`."""

    cotangent: Tensor
    """Gradient of scale * sum of the losses to the raw output, in its dtype  # [B, ...]"""
    loss: Tensor
    """Weighted loss of each sample, float32 (float64 for float64 storage)  # [B]"""


def _reference(
    prediction: Tensor,
    x0: Tensor,
    x_t: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(prediction.dtype, torch.float32)
    b = per_sample(b, x0, compute)
    denoised = per_sample(a, x0, compute) * x_t.to(compute) + b * prediction.to(compute)
    residual = denoised - x0.to(compute)
    loss = mean_over_sample(residual.square())
    cotangent = (2 * scale / elements_per_sample(x0)) * b * residual
    if weight is not None:
        loss = weight.to(compute) * loss
        cotangent = per_sample(weight, x0, compute) * cotangent
    return cotangent.to(prediction.dtype), loss


def _fake(
    prediction: Tensor,
    x0: Tensor,
    x_t: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(prediction.dtype, torch.float32)
    return torch.empty_like(prediction), x0.new_empty(x0.shape[0], dtype=compute)


_denoising_cotangent = Op(
    "denoising_cotangent",
    "(Tensor prediction, Tensor x0, Tensor x_t, Tensor a, Tensor b, Tensor? weight, float scale) "
    "-> (Tensor, Tensor)",
    _reference,
    _fake,
    kernel="denoising",
    batch_outputs=2,
)


_denoising_cotangent.register_cotangent(scale=-1, loss=lambda grad: grad)


def denoising_cotangent(
    prediction: Tensor,
    x0: Tensor,
    x_t: Tensor,
    coefficients: Coefficients,
    weight: Tensor | None = None,
    scale: float = 1.0,
) -> DenoisingCotangent:
    """Weighted denoising loss of each sample and its cotangent for the raw network output.

    The loss is differentiable in ``prediction`` alone: the other inputs are the regression's data.

    Args:
        prediction: raw network output F [B, ...].
        x0: clean samples [B, ...].
        x_t: noisy samples [B, ...].
        coefficients: (a, b) with D = a x_t + b F, each [B].
        weight: weight of each sample's squared error in x0 space [B]; 1 if absent.
        scale: factor of the cotangent alone, as 1 / B for a mean over the batch.

    Returns:
        `DenoisingCotangent`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not belong together.
    """
    check_sample("prediction", prediction)
    check_like(prediction, x0=x0, x_t=x_t)
    check_scale(scale)
    check_batch(prediction, a=coefficients.a, b=coefficients.b, weight=weight)
    layout = Layout.of(prediction)
    cotangent, loss = _denoising_cotangent(
        *map(layout.pack, (prediction, x0, x_t)), *coefficients, weight, scale
    )
    return DenoisingCotangent(layout.unpack(cotangent), loss)
