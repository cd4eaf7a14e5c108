"""`matching_cotangent`: the whole tail of a pathwise distillation loss, in one pass.

From the raw outputs of teacher and critic to the gradient that the student's sample receives
(arXiv 2502.15681, 2305.18455, 2405.14867, 2401.00909):

    F_phi  = F_phi(uncond) + guidance_scale * (F_phi(cond) - F_phi(uncond))
    F_psi  = F_psi(cond) + esd_lambda * (F_psi(uncond) - F_psi(cond))
    D_phi  = a_phi x_t + b_phi F_phi                                  guided teacher's denoiser
    Delta  = D_psi - D_phi
           = b_psi (F_psi - F_phi) + (b_psi - b_phi) F_phi + (a_psi - a_phi) x_t
    n_i    = mean |x0 - D_phi| + 1e-6, or 1                           DMD's normaliser of sample i
    g      = weight_i * Delta / n_i,  0 where that is not finite
    loss_i = 1/2 mean(g^2)                                            mean over sample i's elements
    cotangent = scale * g / N                                         d loss_i / d x0, x0 - g fixed

Where teacher and critic share (a, b) the last two terms of Delta are exactly zero, so that no
precision is lost when the two agree. The loss is DMD's surrogate 1/2 mean((x0 - sg[x0 - g])^2)
without its cancellation, which costs 2.8 % in bfloat16 where the two are 0.01 apart.

Shapes: x0, x_t and the raw outputs [B, ...]; a, b, weight [B]. Bytes moved: each given tensor read
once, the cotangent written once. All arithmetic is float32 whatever the storage (float64 for
float64 storage).
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

NORMALISER_FLOOR = 1e-6


class MatchingCotangent(NamedTuple):
    """Result of `matching_cotangent`; the statistics are float32 (float64 for float64 storage)."""

    cotangent: Tensor
    """Gradient of scale * sum of the losses to x0  # [B, ...]"""
    loss: Tensor
    """1/2 mean(g^2) of each sample  # [B]"""
    residual: Tensor
    """mean |x0 - D_phi|, the normaliser without its floor, of each sample  # [B]"""
    squared_gap: Tensor
    """mean Delta^2 of each sample  # [B]"""
    nonfinite: Tensor
    """Number of elements of g that were not finite and became 0  # [B]"""


def _reference(
    x0: Tensor,
    x_t: Tensor,
    teacher: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    critic: Tensor,
    critic_a: Tensor,
    critic_b: Tensor,
    teacher_uncond: Tensor | None,
    guidance_scale: float,
    critic_uncond: Tensor | None,
    esd_lambda: float,
    weight: Tensor | None,
    normalise: bool,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x0.dtype, torch.float32)
    a_phi, b_phi, a_psi, b_psi = (
        per_sample(value, x0, compute) for value in (teacher_a, teacher_b, critic_a, critic_b)
    )
    x0, x_t, f_phi, f_psi = (value.to(compute) for value in (x0, x_t, teacher, critic))
    if teacher_uncond is not None:
        f_uncond = teacher_uncond.to(compute)
        f_phi = f_uncond + guidance_scale * (f_phi - f_uncond)
    if critic_uncond is not None:
        f_psi = f_psi + esd_lambda * (critic_uncond.to(compute) - f_psi)

    gap = b_psi * (f_psi - f_phi) + (b_psi - b_phi) * f_phi + (a_psi - a_phi) * x_t
    residual = mean_over_sample((x0 - (a_phi * x_t + b_phi * f_phi)).abs())
    factor = torch.ones_like(residual) if weight is None else weight.to(compute)
    if normalise:
        factor = factor / (residual + NORMALISER_FLOOR)
    g = per_sample(factor, x0, compute) * gap
    finite = g.isfinite()
    g = torch.where(finite, g, 0)

    loss = mean_over_sample(g.square()) / 2
    squared_gap = mean_over_sample(torch.where(finite, gap, 0).square())
    nonfinite = (~finite).flatten(1).sum(dim=1).to(compute)
    statistics = torch.stack((loss, residual, squared_gap, nonfinite), dim=1)
    return (g * (scale / elements_per_sample(x0))).to(dtype), statistics


def _fake(x0: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    dtype = args[-1]
    assert isinstance(dtype, torch.dtype)
    compute = torch.promote_types(x0.dtype, torch.float32)
    return torch.empty_like(x0, dtype=dtype), x0.new_empty(x0.shape[0], 4, dtype=compute)


_matching_cotangent = Op(
    "matching_cotangent",
    "(Tensor x0, Tensor x_t, Tensor teacher, Tensor teacher_a, Tensor teacher_b, Tensor critic, "
    "Tensor critic_a, Tensor critic_b, Tensor? teacher_uncond, float guidance_scale, "
    "Tensor? critic_uncond, float esd_lambda, Tensor? weight, bool normalise, float scale, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    _reference,
    _fake,
    kernel="matching",
    batch_outputs=2,
)


_matching_cotangent.register_cotangent(scale=-2, loss=lambda grad: grad[:, 0])


def matching_cotangent(
    x0: Tensor,
    x_t: Tensor,
    teacher: Tensor,
    teacher_coefficients: Coefficients,
    critic: Tensor,
    critic_coefficients: Coefficients,
    *,
    teacher_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    critic_uncond: Tensor | None = None,
    esd_lambda: float = 0.0,
    weight: Tensor | None = None,
    normalise: bool = True,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> MatchingCotangent:
    """Gradient that a pathwise (KL, f-divergence) distillation loss sends into the student.

    The loss is differentiable in ``x0`` alone, with the cotangent as its gradient.

    Args:
        x0: student's samples [B, ...].
        x_t: the same samples noised [B, ...].
        teacher: raw teacher output at x_t, with the condition [B, ...].
        teacher_coefficients: the teacher's (a, b), each [B].
        critic: raw critic output at x_t [B, ...].
        critic_coefficients: the critic's (a, b), each [B].
        teacher_uncond: raw teacher output without the condition, or with the negative one.
        guidance_scale: classifier-free guidance; 1 is the conditional teacher.
        critic_uncond: raw critic output without the condition, for entropic score distillation.
        esd_lambda: weight of the unconditional critic (arXiv 2401.00909).
        weight: h of an f-divergence, or any other weight inside g [B]; 1 if absent.
        normalise: divide by DMD's mean |x0 - D_phi|; False gives Diff-Instruct.
        scale: factor of the cotangent alone, as 1 / B for a mean over the batch.
        dtype: dtype of the cotangent; that of x0 if absent.

    Returns:
        `MatchingCotangent`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not belong together, and for a guidance
            scale or ESD weight without the unconditional output that it needs.
    """
    check_sample("x0", x0)
    check_like(
        x0,
        x_t=x_t,
        teacher=teacher,
        critic=critic,
        teacher_uncond=teacher_uncond,
        critic_uncond=critic_uncond,
    )
    check_batch(
        x0,
        teacher_a=teacher_coefficients.a,
        teacher_b=teacher_coefficients.b,
        critic_a=critic_coefficients.a,
        critic_b=critic_coefficients.b,
        weight=weight,
    )
    check_scale(scale)
    if teacher_uncond is None and guidance_scale != 1.0:
        raise ValueError(f"guidance_scale is {guidance_scale}, which needs teacher_uncond")
    if critic_uncond is None and esd_lambda != 0.0:
        raise ValueError(f"esd_lambda is {esd_lambda}, which needs critic_uncond")
    layout = Layout.of(x0)
    cotangent, statistics = _matching_cotangent(
        layout.pack(x0),
        layout.pack(x_t),
        layout.pack(teacher),
        *teacher_coefficients,
        layout.pack(critic),
        *critic_coefficients,
        layout.pack_optional(teacher_uncond),
        guidance_scale,
        layout.pack_optional(critic_uncond),
        esd_lambda,
        weight,
        normalise,
        scale,
        dtype or x0.dtype,
    )
    return MatchingCotangent(layout.unpack(cotangent), *statistics.unbind(1))
