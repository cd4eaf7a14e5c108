"""`density_ratio_weight`: from discriminator logits to the weight h(r) of an f-divergence.

For a discriminator trained with the logistic loss, r = p/q = exp(logit), teacher over student
(arXiv 2502.15681). With logits l [B, K] of K heads and the noise-level bin of each sample:

    r      = clamp(exp(clamp(mean_k l_k, -logit_clamp, logit_clamp)), ratio_min, ratio_max)
    S, C   = decay * (S, C) + (sum of r, number of samples) of each bin in this batch
    r_i    = r_i / mean_b,    mean_b = (S_b + prior) / (C_b + prior)   since E_q[r] = 1
    h_i    = r^p (c_0 + c_1 r)^q                                           every row of the f-table
    h_i    = h_i / mean(h)                                                 over the batch

The history (S, C) is weighted by counts, so that a bin seen rarely keeps what it knows, and the
``prior`` pseudo-samples of ratio 1 keep a sample that is alone in a new bin from being divided by
itself, which would erase the signal. Everything is [B]-sized: one launch, no host sync.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.ops._op import Op


class DensityRatioWeight(NamedTuple):
    """Result of `density_ratio_weight`."""

    weight: Tensor
    """h of each sample, mean 1 over the batch, float32  # [B]"""
    ratio: Tensor
    """Calibrated density ratio r of each sample, float32  # [B]"""
    history: Tensor
    """New (sum of ratios, count) of each bin, float32  # [bins, 2]"""


def _reference(
    logits: Tensor,
    bin_index: Tensor,
    history: Tensor,
    power: float,
    c0: float,
    c1: float,
    exponent: float,
    decay: float,
    prior: float,
    logit_clamp: float,
    ratio_min: float,
    ratio_max: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logit = logits.to(history.dtype).mean(dim=1).clamp(-logit_clamp, logit_clamp)
    ratio = logit.exp().clamp(ratio_min, ratio_max)
    seen = torch.stack((ratio, torch.ones_like(ratio)), dim=1)
    history = (decay * history).index_add(0, bin_index, seen)
    mean = (history[:, 0] + prior) / (history[:, 1] + prior)
    ratio = ratio / mean[bin_index]
    h = ratio.pow(power) * (c0 + c1 * ratio).pow(exponent)
    return h / h.mean(), ratio, history


def _fake(
    logits: Tensor, bin_index: Tensor, history: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    weight = history.new_empty(logits.shape[0])
    return weight, torch.empty_like(weight), torch.empty_like(history)


_density_ratio_weight = Op(
    "density_ratio_weight",
    "(Tensor logits, Tensor bin_index, Tensor history, float power, float c0, float c1, "
    "float exponent, float decay, float prior, float logit_clamp, float ratio_min, "
    "float ratio_max) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    kernel="density_ratio",
    batch_outputs=3,
    replicated=None,
)


def density_ratio_weight(
    logits: Tensor,
    bin_index: Tensor,
    history: Tensor,
    *,
    power: float,
    c0: float = 1.0,
    c1: float = 0.0,
    exponent: float = 0.0,
    decay: float = 0.9,
    prior: float = 1.0,
    logit_clamp: float = 10.0,
    ratio_min: float = 0.1,
    ratio_max: float = 20.0,
    group: torch.distributed.ProcessGroup | None = None,
) -> DensityRatioWeight:
    """Weights h(r) of the samples of a batch, from the discriminator's logits. No gradient.

    `fastdistill.objectives.Divergence` gives (power, c0, c1, exponent) of every divergence by name.

    Args:
        logits: discriminator logits on the noised student samples [B] or [B, heads].
        bin_index: noise-level bin of each sample, int64 [B], as `log_snr_bin` gives it.
        history: (sum of ratios, count) of each bin, float32 [bins, 2]; zeros at the start.
        power: p of h = r^p (c0 + c1 r)^q.
        c0: c_0 of h.
        c1: c_1 of h.
        exponent: q of h.
        decay: factor of the history before this batch is added; 0 uses this batch alone.
        prior: pseudo-samples of ratio 1 in each bin.
        logit_clamp: bound of |logit|.
        ratio_min: lower bound of the raw ratio.
        ratio_max: upper bound of the raw ratio.
        group: process group over which bins and means are global: every rank computes the whole
            batch's weights from one all-gather, so that N ranks equal one.

    Returns:
        `DensityRatioWeight`; the history is a new tensor, identical on every rank.

    Raises:
        ValueError: for shapes or dtypes of another form, or decay outside [0, 1].
    """
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}; expected floating point, "
            "[B] or [B, heads]"
        )
    if bin_index.shape != logits.shape[:1] or bin_index.dtype != torch.int64:
        raise ValueError(
            f"bin_index is {bin_index.dtype} of shape {tuple(bin_index.shape)}; expected int64 of "
            f"shape ({logits.shape[0]},)"
        )
    if history.ndim != 2 or history.shape[1] != 2:
        raise ValueError(
            f"history has shape {tuple(history.shape)}; expected [bins, 2]: torch.zeros(bins, 2)"
        )
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}; expected a number from 0 to 1")
    logits, rank, count = logits.detach(), 0, logits.shape[0]
    if group is not None:
        rank = group.rank()
        logits, bin_index = _gather(logits.float(), group), _gather(bin_index, group)
    weight, ratio, history = _density_ratio_weight(
        logits.contiguous(),
        bin_index.contiguous(),
        history.contiguous(),
        power,
        c0,
        c1,
        exponent,
        decay,
        prior,
        logit_clamp,
        ratio_min,
        ratio_max,
    )
    mine = slice(rank * count, (rank + 1) * count)
    return DensityRatioWeight(weight[mine], ratio[mine], history)


def _gather(value: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    whole = value.new_empty(group.size() * value.shape[0], *value.shape[1:])
    # torch 2.13 has a new name for it, and warns of the old one.
    new_name = getattr(torch.distributed, "all_gather_single", None)
    gather = new_name or torch.distributed.all_gather_into_tensor
    gather(whole, value.contiguous(), group=group)
    return whole


def log_snr_bin(
    alpha: Tensor, sigma: Tensor, bins: int, log_snr_min: float, log_snr_max: float
) -> Tensor:
    """Bin of each sample on an even grid of log(alpha^2 / sigma^2), clamped to the ends.

    Args:
        alpha: signal coefficient [B].
        sigma: noise coefficient [B].
        bins: number of bins.
        log_snr_min: log-SNR at the lower edge of bin 0.
        log_snr_max: log-SNR at the upper edge of the last bin.

    Returns:
        int64 [B] in [0, bins).
    """
    log_snr = 2 * (alpha.log() - sigma.log())
    position = (log_snr - log_snr_min) * (bins / (log_snr_max - log_snr_min))
    return position.floor().clamp(0, bins - 1).long()
