"""`consistency_cotangent`: a consistency loss over whole samples and its gradient.

    D         = a * x_t + b * F                       online network's consistency function
    T         = target, or a_r * x_r + b_r * F_r      detached; another time, or the clean sample
    S         = ||D - T||^2 + c^2                     over the whole sample i
    loss_i    = weight_i * (S^(p/2) - c^p)
    cotangent = scale * d loss_i / dF = scale * weight_i * b_i * p S^(p/2 - 1) * (D - T)

The pseudo-Huber distance (p = 1) of whole samples with c = 0.00054 sqrt(N) is that of improved
consistency training (arXiv 2310.14189), c = 0 that of easy consistency tuning (arXiv 2406.14548);
`weight` carries 1 / (t - r). Taking it elementwise with that c, as some public code does, is
another and much larger loss. The norm is the sample's own, not divided by N.

Shapes: F, x_t, target, x_r [B, ...]; a, b, weight [B]. Bytes moved: each given tensor read once,
the cotangent written once. All arithmetic is float32 whatever the storage (float64 for float64
storage).
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
    per_sample,
)
from fastdistill.ops._distance import Distance, check_distance
from fastdistill.ops._op import Op


class ConsistencyCotangent(NamedTuple):
    """Result of `consistency_cotangent`."""

    cotangent: Tensor
    """Gradient of scale * sum of the losses to the raw output, in its dtype  # [B, ...]"""
    loss: Tensor
    """Loss of each sample, float32 (float64 for float64 storage)  # [B]"""


def _reference(
    prediction: Tensor,
    x_t: Tensor,
    a: Tensor,
    b: Tensor,
    target: Tensor,
    target_x: Tensor | None,
    target_a: Tensor | None,
    target_b: Tensor | None,
    weight: Tensor | None,
    exponent: float,
    offset: float,
    elementwise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(prediction.dtype, torch.float32)
    b = per_sample(b, prediction, compute)
    aim = target.to(compute)
    if target_x is not None and target_a is not None and target_b is not None:
        aim = per_sample(target_b, aim, compute) * aim
        aim = per_sample(target_a, aim, compute) * target_x.to(compute) + aim
    residual = per_sample(a, prediction, compute) * x_t.to(compute) + b * prediction.to(compute)
    residual = residual - aim
    factor = residual.new_ones(len(residual)) if weight is None else weight.to(compute)
    if elementwise:
        loss, direction = residual.abs().flatten(1).sum(dim=1), residual.sign()
        gradient = torch.ones_like(loss)
    else:
        norm = residual.square().flatten(1).sum(dim=1)
        square = norm + offset**2
        at_zero = square == 0
        gradient = exponent * torch.where(at_zero, 1, square) ** (exponent / 2 - 1)
        if exponent != 2:
            gradient = torch.where(at_zero, 0, gradient)
        # sqrt(S) - c without its cancellation; for other exponents c is 0
        loss = norm / (square.sqrt() + offset) if offset > 0 else norm ** (exponent / 2)
        direction = residual
    cotangent = per_sample(scale * factor * gradient, prediction, compute) * (b * direction)
    return cotangent.to(prediction.dtype), factor * loss


def _fake(prediction: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(prediction.dtype, torch.float32)
    return torch.empty_like(prediction), prediction.new_empty(prediction.shape[0], dtype=compute)


_consistency_cotangent = Op(
    "consistency_cotangent",
    "(Tensor prediction, Tensor x_t, Tensor a, Tensor b, Tensor target, Tensor? target_x, "
    "Tensor? target_a, Tensor? target_b, Tensor? weight, float exponent, float offset, "
    "bool elementwise, float scale) -> (Tensor, Tensor)",
    _reference,
    _fake,
    kernel="consistency",
    batch_outputs=2,
)

_consistency_cotangent.register_cotangent(scale=-1, loss=lambda grad: grad)


def consistency_cotangent(
    prediction: Tensor,
    x_t: Tensor,
    coefficients: Coefficients,
    target: Tensor,
    *,
    distance: Distance,
    target_x: Tensor | None = None,
    target_coefficients: Coefficients | None = None,
    weight: Tensor | None = None,
    scale: float = 1.0,
) -> ConsistencyCotangent:
    """Consistency loss of each sample and its cotangent for the online network's raw output.

    The loss is differentiable in ``prediction`` alone.

    Args:
        prediction: raw output F of the online network at (x_t, t) [B, ...].
        x_t: noisy samples at t [B, ...].
        coefficients: (a, b) at t, those of the consistency function's boundary condition, each [B].
        target: what D is drawn to: a clean or denoised sample, or, with ``target_x`` and
            ``target_coefficients``, the raw output at the earlier time [B, ...].
        distance: distance of whole samples, as ``Distance.pseudo_huber(0.00054 * N**0.5)``.
        target_x: noisy samples at the earlier time [B, ...].
        target_coefficients: (a, b) at the earlier time, each [B].
        weight: weight of each sample, as 1 / (t - r) [B]; 1 if absent.
        scale: factor of the cotangent alone, as 1 / B for a mean over the batch.

    Returns:
        `ConsistencyCotangent`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not belong together, for a distance that
            is not of the family, and for only one of ``target_x`` and ``target_coefficients``.
    """
    check_sample("prediction", prediction)
    check_like(prediction, x_t=x_t, target=target, target_x=target_x)
    target_a, target_b = target_coefficients or (None, None)
    check_batch(
        prediction,
        a=coefficients.a,
        b=coefficients.b,
        target_a=target_a,
        target_b=target_b,
        weight=weight,
    )
    check_scale(scale)
    check_distance(distance)
    if (target_x is None) != (target_coefficients is None):
        raise ValueError(
            "target_x and target_coefficients belong together: give both for a raw target output, "
            "neither for a finished target"
        )
    layout = Layout.of(prediction)
    cotangent, loss = _consistency_cotangent(
        layout.pack(prediction),
        layout.pack(x_t),
        *coefficients,
        layout.pack(target),
        layout.pack_optional(target_x),
        target_a,
        target_b,
        weight,
        *distance,
        scale,
    )
    return ConsistencyCotangent(layout.unpack(cotangent), loss)
