"""Losses for other people's loops: ordinary differentiable functions around the fused ops.

Each looks at tensors alone, and compiles with ``torch.compile(fullgraph=True)``. The engine's own
objectives do not use them: they send the cotangents straight into the networks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastdistill.diffusion import X0, EDMPreconditioning, Epsilon, Flow, Parametrisation, V
from fastdistill.ops import (
    Distance,
    consistency_cotangent,
    denoising_cotangent,
    matching_cotangent,
    projection_cotangents,
)

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]
"""diffusers' names of what a network predicts, and flow (rectified flow) and edm."""

_PARAMETRISATIONS: dict[str, Parametrisation] = {
    "epsilon": Epsilon(),
    "v_prediction": V(),
    "sample": X0(),
    "flow": Flow(),
    "edm": EDMPreconditioning(),
}


def distribution_matching_loss(
    sample: Tensor,
    x_t: Tensor,
    teacher_output: Tensor,
    critic_output: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    prediction_type: PredictionType | Parametrisation = "epsilon",
    critic_prediction_type: PredictionType | Parametrisation | None = None,
    teacher_output_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    weight: Tensor | None = None,
    normalise: bool = True,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """DMD2's, Diff-Instruct's or (with ``weight``) f-distill's loss of a student's samples.

    The value is 1/2 mean(g^2), with g as `fastdistill.ops.matching` defines it, and the gradient to
    ``sample`` is exactly g / N, formed in float32 whatever the dtypes; nothing else receives a
    gradient. It equals ``0.5 * mse_loss(sample, (sample - g).detach())`` without its rounding in
    bfloat16.

    Args:
        sample: student's samples [B, ...]; their gradient is wanted.
        x_t: ``alpha * sample + sigma * noise`` [B, ...].
        teacher_output: raw output of the teacher at x_t [B, ...].
        critic_output: raw output of the critic (fake score) at x_t [B, ...].
        alpha: signal coefficient of each sample [B], as sqrt(alphas_cumprod[t]).
        sigma: noise coefficient of each sample [B], as sqrt(1 - alphas_cumprod[t]).
        prediction_type: what the teacher predicts: diffusers' name, or a parametrisation.
        critic_prediction_type: what the critic predicts; the same if None.
        teacher_output_uncond: teacher's output without the condition, for guidance.
        guidance_scale: classifier-free guidance; 1 is none.
        weight: h of an f-divergence for each sample [B], as `fastdistill.ops.density_ratio_weight`
            gives it.
        normalise: divide by mean |sample - D_teacher| (DMD); False is Diff-Instruct.
        reduction: mean over the batch, or one loss a sample [B].

    Returns:
        The loss: a scalar, or [B].

    Raises:
        ValueError: for an unknown prediction type or reduction, or tensors that do not fit.
    """
    teacher = _parametrisation(prediction_type)
    critic = teacher if critic_prediction_type is None else _parametrisation(critic_prediction_type)
    result = matching_cotangent(
        sample,
        x_t.detach(),
        teacher_output.detach(),
        teacher.coefficients(alpha, sigma),
        critic_output.detach(),
        critic.coefficients(alpha, sigma),
        teacher_uncond=None if teacher_output_uncond is None else teacher_output_uncond.detach(),
        guidance_scale=guidance_scale,
        weight=weight,
        normalise=normalise,
    )
    return _reduce(result.loss, reduction)


def denoising_loss(
    model_output: Tensor,
    sample: Tensor,
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    prediction_type: PredictionType | Parametrisation = "epsilon",
    weight: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Mean squared error of the network's own prediction, as a critic (fake score) is trained.

    Args:
        model_output: raw output of the network at x_t [B, ...]; its gradient is wanted.
        sample: clean samples [B, ...], without a gradient.
        x_t: ``alpha * sample + sigma * noise`` [B, ...].
        alpha: signal coefficient of each sample [B].
        sigma: noise coefficient of each sample [B].
        prediction_type: what the network predicts: diffusers' name, or a parametrisation.
        weight: further weight of each sample [B].
        reduction: mean over the batch, or one loss a sample [B].

    Returns:
        The loss: a scalar, or [B].

    Raises:
        ValueError: for an unknown prediction type or reduction, or tensors that do not fit.
    """
    coefficients = _parametrisation(prediction_type).coefficients(alpha, sigma)
    own_space = coefficients.b.square().reciprocal()
    result = denoising_cotangent(
        model_output,
        sample.detach(),
        x_t.detach(),
        coefficients,
        own_space if weight is None else own_space * weight,
    )
    return _reduce(result.loss, reduction)


def score_projection_loss(
    sample: Tensor,
    x_t: Tensor,
    teacher_output: Tensor,
    critic_output: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    prediction_type: PredictionType | Parametrisation = "epsilon",
    critic_prediction_type: PredictionType | Parametrisation | None = None,
    distance: Distance | None = None,
    of_scores: bool = False,
    sid_alpha: float = 1.0,
    teacher_output_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    weight: Tensor | None = None,
    normalise: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """SIM's, Diff-Instruct*'s or SiD's loss of a student's samples (`fastdistill.ops.projection`).

    Unlike `distribution_matching_loss` it is differentiated through both networks, whose parameters
    are frozen: run them with a graph on an x_t that hangs on ``sample``. Distances are of whole
    samples, as in the papers (arXiv 2410.16794, 2404.04057), not means over elements.

    Args:
        sample: student's samples [B, ...].
        x_t: ``alpha * sample + sigma * noise`` [B, ...], with its graph.
        teacher_output: raw output of the teacher at x_t [B, ...], with its graph.
        critic_output: raw output of the critic (fake score) at x_t [B, ...], with its graph.
        alpha: signal coefficient of each sample [B].
        sigma: noise coefficient of each sample [B].
        prediction_type: what the teacher predicts: diffusers' name, or a parametrisation.
        critic_prediction_type: what the critic predicts; the same if None.
        distance: of the two predictions, as ``Distance.pseudo_huber(c)`` (SIM); squared L2 if None.
        of_scores: take the distance of scores, not of denoised samples.
        sid_alpha: SiD's coefficient; 1 is SIM and Diff-Instruct*.
        teacher_output_uncond: teacher's output without the condition, for guidance.
        guidance_scale: classifier-free guidance; 1 is none.
        weight: weight of each sample [B]; SiD's loss has 1/2.
        normalise: divide by mean |sample - D_teacher|, as SiD does.
        reduction: mean over the batch, or one loss a sample [B].

    Returns:
        The loss: a scalar, or [B].

    Raises:
        ValueError: for an unknown prediction type or reduction, or tensors that do not fit.
    """
    teacher = _parametrisation(prediction_type)
    critic = teacher if critic_prediction_type is None else _parametrisation(critic_prediction_type)
    result = projection_cotangents(
        sample,
        x_t,
        teacher_output,
        teacher.coefficients(alpha, sigma),
        critic_output,
        critic.coefficients(alpha, sigma),
        distance=distance,
        alpha=sid_alpha,
        score_scale=alpha / sigma.square() if of_scores else None,
        teacher_uncond=teacher_output_uncond,
        guidance_scale=guidance_scale,
        weight=weight,
        normalise=normalise,
    )
    return _reduce(result.loss, reduction)


def consistency_loss(
    model_output: Tensor,
    target: Tensor,
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    prediction_type: PredictionType | Parametrisation = "edm",
    target_x_t: Tensor | None = None,
    target_alpha: Tensor | None = None,
    target_sigma: Tensor | None = None,
    distance: Distance | None = None,
    weight: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Consistency loss: the denoised sample at one time, drawn to that at an earlier one.

    Args:
        model_output: raw output of the network at x_t [B, ...]; its gradient is wanted.
        target: what is denoised at the earlier time, or a clean sample [B, ...]; with
            ``target_x_t`` the raw output there. It gets no gradient.
        x_t: ``alpha * sample + sigma * noise`` [B, ...].
        alpha: signal coefficient of each sample [B].
        sigma: noise coefficient of each sample [B].
        prediction_type: what the network predicts: diffusers' name, or a parametrisation, as one
            whose coefficients hold a boundary condition at another time than 0.
        target_x_t: the same sample and noise at the earlier time [B, ...].
        target_alpha: signal coefficient at the earlier time [B].
        target_sigma: noise coefficient at the earlier time [B].
        distance: of whole samples; pseudo-Huber with c = 0.00054 sqrt(N) for N elements if None
            (iCT, arXiv 2310.14189).
        weight: weight of each sample, as 1 / (t - r) [B].
        reduction: mean over the batch, or one loss a sample [B].

    Returns:
        The loss: a scalar, or [B].

    Raises:
        ValueError: for an unknown prediction type or reduction, tensors that do not fit, and a part
            of what belongs to the earlier time without the others.
    """
    kind = _parametrisation(prediction_type)
    earlier = None
    if target_alpha is not None and target_sigma is not None:
        earlier = kind.coefficients(target_alpha, target_sigma)
    if len({part is None for part in (target_x_t, target_alpha, target_sigma)}) != 1:
        raise ValueError(
            "target_x_t, target_alpha and target_sigma belong together: give all where target is a "
            "raw output, none where it is a sample"
        )
    if distance is None:
        distance = Distance.pseudo_huber(0.00054 * model_output[0].numel() ** 0.5)
    result = consistency_cotangent(
        model_output,
        x_t.detach(),
        kind.coefficients(alpha, sigma),
        target.detach(),
        distance=distance,
        target_x=None if target_x_t is None else target_x_t.detach(),
        target_coefficients=earlier,
        weight=weight,
    )
    return _reduce(result.loss, reduction)


def _parametrisation(kind: PredictionType | Parametrisation) -> Parametrisation:
    if not isinstance(kind, str):
        return kind
    if kind not in _PARAMETRISATIONS:
        raise ValueError(
            f"prediction_type is {kind!r}; expected one of {', '.join(_PARAMETRISATIONS)}, or a "
            "parametrisation of fastdistill.diffusion"
        )
    return _PARAMETRISATIONS[kind]


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction != "mean":
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'none'")
    return torch.mean(loss)
