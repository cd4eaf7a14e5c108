"""`projection_cotangents`: the tail of a score-projection loss, all cotangents from one pass.

Score Implicit Matching (arXiv 2410.16794), Score identity Distillation (arXiv 2404.04057) and
Diff-Instruct* (arXiv 2410.20898) differentiate through both networks: their parameters are frozen,
their input x_t is live. One loss holds all three:

    F_phi  = F_phi(uncond) + guidance_scale * (F_phi(cond) - F_phi(uncond))
    D_phi  = a_phi x_t + b_phi F_phi,   D_psi = a_psi x_t + b_psi F_psi
    E      = D_phi - D_psi
    loss_i = weight_i / n_i * < d'(k_i E), k_i (D_phi - x0 - alpha E) >

with d a `Distance` of the whole sample, k = score_scale = alpha_t / sigma_t^2 for distances in
score space (1 in denoiser space), and n = max(mean |x0 - D_phi|, 1e-5), detached, or 1. SIM and DI*
are alpha = 1 with any d; SiD is the squared L2 with weight 1/2, where alpha = 1/2 is half the exact
Fisher gradient and alpha = 1 half of SIM's. d' is differentiated too, which no test of a mean's
shift can see: with S = ||k E||^2 + c^2, G = p S^(p/2 - 1), R = D_phi - x0 and
P = k^2 <E, R - alpha E>,

    m = weight k^2 G / n,    tau = (p - 2) P / S
    d loss / d D_phi =  m (R + (1 - 2 alpha + tau) E)
    d loss / d D_psi = -m (R - (2 alpha - tau) E)
    d loss / d x0    = -m E                                    (beside the path through x_t)

and for L1, where d'(kE) = sign(E) and m = weight k / n: m (1 - alpha) sign(E), m alpha sign(E) and
-m sign(E). Chained to the raw outputs: a and b times these, guidance_scale and 1 - guidance_scale
to the conditional and unconditional teacher. Inner products and norms are sums over the sample, as
in the papers: scale = 1 / (B N) gives the mean convention of `matching_cotangent`.

A sample whose loss is not finite is dropped: its cotangents and its other statistics are 0.

Shapes: x0, x_t and raw outputs [B, ...]; a, b, weight, score_scale [B]. Bytes moved: each given
tensor read once, a cotangent of each written once. All arithmetic is float32 whatever the storage
(float64 for float64 storage).
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
    mean_over_sample,
    per_sample,
)
from fastdistill.ops._distance import Distance, check_distance
from fastdistill.ops._op import Op

NORMALISER_FLOOR = 1e-5


class ProjectionCotangents(NamedTuple):
    """Result of `projection_cotangents`: gradients of scale * sum of the losses, and statistics.

    Cotangents have the dtype of what they belong to; statistics are float32 (float64 for float64).
    """

    x0: Tensor
    """To x0 alone, without the path through x_t  # [B, ...]"""
    x_t: Tensor
    """To x_t in D = a x_t + b F, without the path through the networks  # [B, ...]"""
    teacher: Tensor
    """To the raw (conditional) teacher output  # [B, ...]"""
    teacher_uncond: Tensor | None
    """To the raw unconditional teacher output, where that was given  # [B, ...]"""
    critic: Tensor
    """To the raw critic output  # [B, ...]"""
    loss: Tensor
    """Loss of each sample, 0 where it was dropped  # [B]"""
    residual: Tensor
    """mean |x0 - D_phi| of each sample  # [B]"""
    squared_gap: Tensor
    """mean E^2 of each sample  # [B]"""
    dropped: Tensor
    """1 for a sample whose loss was not finite, else 0  # [B]"""


class _Factors(NamedTuple):
    """Per-sample numbers [B] with d loss / d D = of_residual R + of_gap d', for each D."""

    loss: Tensor
    residual: Tensor
    """m of R in the gradient to D_phi; that to D_psi has its negative."""
    gap_phi: Tensor
    gap_psi: Tensor
    gap_x0: Tensor


def _factors(
    gap: Tensor, residual: Tensor, m: Tensor, k: Tensor, distance: Distance, alpha: float
) -> _Factors:
    """The sums over E = gap and R = residual [B, ...] that their gradients need."""
    gap_square, product = _sample_sum(gap.square()), _sample_sum(gap * residual)
    if distance.elementwise:
        m = m * k
        loss = _sample_sum(gap.sign() * residual) - alpha * _sample_sum(gap.abs())
        return _Factors(m * loss, torch.zeros_like(m), m * (1 - alpha), m * alpha, -m)
    square = k.square() * gap_square + distance.offset**2  # S
    product = k.square() * (product - alpha * gap_square)  # P
    at_zero = square == 0
    safe = torch.where(at_zero, 1, square)
    gradient = distance.exponent * safe ** (distance.exponent / 2 - 1)  # G
    if distance.exponent != 2:
        gradient = torch.where(at_zero, 0, gradient)
    tau = (distance.exponent - 2) * torch.where(at_zero, 0, product / safe)
    loss = m * gradient * product
    m = m * k.square() * gradient
    return _Factors(loss, m, m * (1 - 2 * alpha + tau), m * (2 * alpha - tau), -m)


def _sample_sum(value: Tensor) -> Tensor:
    return value.flatten(1).sum(dim=1)


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
    weight: Tensor | None,
    score_scale: Tensor | None,
    exponent: float,
    offset: float,
    elementwise: bool,
    alpha: float,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x0.dtype, torch.float32)
    a_phi, b_phi, a_psi, b_psi = (
        per_sample(value, x0, compute) for value in (teacher_a, teacher_b, critic_a, critic_b)
    )
    clean, x, f_phi, f_psi = (value.to(compute) for value in (x0, x_t, teacher, critic))
    if teacher_uncond is not None:
        f_uncond = teacher_uncond.to(compute)
        f_phi = f_uncond + guidance_scale * (f_phi - f_uncond)

    gap = b_psi * (f_phi - f_psi) + (b_phi - b_psi) * f_phi + (a_phi - a_psi) * x
    residual = a_phi * x + b_phi * f_phi - clean
    absolute = mean_over_sample(residual.abs())
    m = torch.ones_like(absolute) if weight is None else weight.to(compute)
    if normalise:
        m = m / absolute.clamp(min=NORMALISER_FLOOR)
    k = torch.ones_like(absolute) if score_scale is None else score_scale.to(compute)
    factors = _factors(gap, residual, m, k, Distance(exponent, offset, elementwise), alpha)
    finite = factors.loss.isfinite()
    kept = per_sample(finite, x0, torch.bool)
    direction = gap.sign() if elementwise else gap

    def gradient(of_residual: Tensor, of_gap: Tensor) -> Tensor:
        r, e = (per_sample(value, x0, compute) for value in (of_residual, of_gap))
        return torch.where(kept, scale * (r * residual + e * direction), 0)

    to_phi = gradient(factors.residual, factors.gap_phi)
    to_psi = gradient(-factors.residual, factors.gap_psi)
    to_x0 = gradient(torch.zeros_like(absolute), factors.gap_x0)
    to_x_t = a_phi * to_phi + a_psi * to_psi
    to_teacher, to_uncond = b_phi * to_phi, x0.new_empty(x0.shape[0], 0)
    if teacher_uncond is not None:
        to_uncond = ((1 - guidance_scale) * to_teacher).to(teacher_uncond.dtype)
        to_teacher = guidance_scale * to_teacher
    statistics = torch.stack((factors.loss, absolute, mean_over_sample(gap.square())), dim=1)
    statistics = torch.where(finite[:, None], statistics, 0)
    return (
        to_x0.to(x0.dtype),
        to_x_t.to(x_t.dtype),
        to_teacher.to(teacher.dtype),
        to_uncond,
        (b_psi * to_psi).to(critic.dtype),
        torch.cat((statistics, (~finite).to(compute)[:, None]), dim=1),
    )


def _fake(
    x0: Tensor,
    x_t: Tensor,
    teacher: Tensor,
    teacher_a: Tensor,
    teacher_b: Tensor,
    critic: Tensor,
    critic_a: Tensor,
    critic_b: Tensor,
    teacher_uncond: Tensor | None,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute = torch.promote_types(x0.dtype, torch.float32)
    return (
        torch.empty_like(x0),
        torch.empty_like(x_t),
        torch.empty_like(teacher),
        x0.new_empty(x0.shape[0], 0)
        if teacher_uncond is None
        else torch.empty_like(teacher_uncond),
        torch.empty_like(critic),
        x0.new_empty(x0.shape[0], 4, dtype=compute),
    )


_projection_cotangents = Op(
    "projection_cotangents",
    "(Tensor x0, Tensor x_t, Tensor teacher, Tensor teacher_a, Tensor teacher_b, Tensor critic, "
    "Tensor critic_a, Tensor critic_b, Tensor? teacher_uncond, float guidance_scale, "
    "Tensor? weight, Tensor? score_scale, float exponent, float offset, bool elementwise, "
    "float alpha, bool normalise, float scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    kernel="projection",
    batch_outputs=6,
)

_projection_cotangents.register_cotangent(
    scale=-1, loss=lambda grad: grad[:, 0], cotangents={0: 0, 1: 1, 2: 2, 8: 3, 5: 4}
)


def projection_cotangents(
    x0: Tensor,
    x_t: Tensor,
    teacher: Tensor,
    teacher_coefficients: Coefficients,
    critic: Tensor,
    critic_coefficients: Coefficients,
    *,
    distance: Distance | None = None,
    alpha: float = 1.0,
    score_scale: Tensor | None = None,
    teacher_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    weight: Tensor | None = None,
    normalise: bool = False,
    scale: float = 1.0,
) -> ProjectionCotangents:
    """Gradients of a score-projection loss (SIM, SiD, DI*) to everything that it reads.

    The loss is differentiable in ``x0``, ``x_t`` and the raw outputs: ``x_t`` must stay attached to
    ``x0`` (as `renoise` leaves it) and the networks' outputs to ``x_t``.

    Args:
        x0: student's samples [B, ...].
        x_t: the same samples noised [B, ...].
        teacher: raw teacher output at x_t, with the condition [B, ...].
        teacher_coefficients: the teacher's (a, b), each [B].
        critic: raw critic output at x_t [B, ...].
        critic_coefficients: the critic's (a, b), each [B].
        distance: distance of the two denoisers or scores; squared L2 if absent.
        alpha: SiD's coefficient; 1 is SIM and Diff-Instruct*.
        score_scale: alpha_t / sigma_t^2 of each sample, for a distance of scores [B]; absent, it
            is one of denoisers.
        teacher_uncond: raw teacher output without the condition, or with the negative one.
        guidance_scale: classifier-free guidance; 1 is the conditional teacher.
        weight: weight of each sample [B]; 1 if absent.
        normalise: divide by mean |x0 - D_phi|, at least 1e-5 and detached, as SiD does.
        scale: factor of the cotangents alone, as 1 / B for a mean over the batch.

    Returns:
        `ProjectionCotangents`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not belong together, for a distance that
            is not of the family, and for guidance without the output that it needs.
    """
    check_sample("x0", x0)
    check_like(x0, x_t=x_t, teacher=teacher, critic=critic, teacher_uncond=teacher_uncond)
    check_batch(
        x0,
        teacher_a=teacher_coefficients.a,
        teacher_b=teacher_coefficients.b,
        critic_a=critic_coefficients.a,
        critic_b=critic_coefficients.b,
        weight=weight,
        score_scale=score_scale,
    )
    check_scale(scale)
    distance = Distance.squared_l2() if distance is None else distance
    check_distance(distance)
    if teacher_uncond is None and guidance_scale != 1.0:
        raise ValueError(f"guidance_scale is {guidance_scale}, which needs teacher_uncond")
    layout = Layout.of(x0)
    *cotangents, statistics = _projection_cotangents(
        layout.pack(x0),
        layout.pack(x_t),
        layout.pack(teacher),
        *teacher_coefficients,
        layout.pack(critic),
        *critic_coefficients,
        layout.pack_optional(teacher_uncond),
        guidance_scale,
        weight,
        score_scale,
        *distance,
        alpha,
        normalise,
        scale,
    )
    to_x0, to_x_t, to_teacher, to_uncond, to_critic = cotangents
    return ProjectionCotangents(
        layout.unpack(to_x0),
        layout.unpack(to_x_t),
        layout.unpack(to_teacher),
        None if teacher_uncond is None else layout.unpack(to_uncond),
        layout.unpack(to_critic),
        *statistics.unbind(1),
    )
