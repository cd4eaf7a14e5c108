"""What became of a mixture's modes: which are covered, with what weights, and how well.

A sample belongs to the component of the highest responsibility, w_k N(x; m_k, C_k) / p(x).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.diffusion import GaussianMixture
from fastdistill.evaluate._arguments import check_features
from fastdistill.evaluate.divergences import gaussian_kl

COVERED = 0.25
"""Share of its true weight from which on a mode counts as covered."""
OUTSIDE = 1e-3
"""Share of the truth's own samples that lie as far from their mode as an outlier."""


class Modes(NamedTuple):
    """Result of `modes`."""

    covered: int
    """Modes with at least a quarter of their true weight among the samples near them"""
    weight_min: float
    """Smallest share of a mode, divided by its true weight"""
    weight_max: float
    """Largest share of a mode, divided by its true weight"""
    outliers: float
    """Share of samples farther from their mode than all but 0.1 % of the truth's are"""


class FittedModes(NamedTuple):
    """Result of `fitted_divergences`, in nats."""

    reverse_kl: float
    """KL(q || p) of a mixture of the modes' Gaussian fits"""
    forward_kl: float
    """KL(p || q) of it; infinite where a mode has too few samples for a covariance"""


def modes(samples: Tensor, truth: GaussianMixture) -> Modes:
    """Count and weigh the modes that samples are in.

    Args:
        samples: floating-point samples [n, d].
        truth: the mixture.

    Raises:
        ValueError: no samples, another number of dimensions, or non-finite samples.
    """
    belongs, radius = _assign(samples, truth)
    inside = (
        torch.special.gammaincc(torch.full_like(radius, truth.dimensions / 2), radius / 2)
        >= OUTSIDE
    )  # [n]
    weights = truth.log_weights.exp().double()
    count = len(weights)
    shares = torch.bincount(belongs, minlength=count).double() / len(samples) / weights
    near = torch.bincount(belongs[inside], minlength=count).double() / len(samples) / weights
    return Modes(
        int((near >= COVERED).sum()),
        float(shares.min()),
        float(shares.max()),
        1 - float(inside.double().mean()),
    )


def _assign(samples: Tensor, truth: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Component of each sample, and its squared Mahalanobis distance there  # [n], [n] float64"""
    check_features("samples", samples, rows=1)
    samples = samples.to(truth.means)
    clean = samples.new_ones(len(samples)), samples.new_zeros(len(samples))
    belongs = truth.denoise(samples, *clean).posterior.argmax(1)
    radius = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
    for k, covariance in enumerate(truth.covariances.double()):
        rows = (belongs == k).nonzero().flatten()
        factor = torch.linalg.cholesky(covariance)
        centred = (samples[rows] - truth.means[k]).double().T
        whitened = torch.linalg.solve_triangular(factor, centred, upper=False)
        radius[rows] = whitened.square().sum(0)
    return belongs, radius


def fitted_divergences(samples: Tensor, truth: GaussianMixture) -> FittedModes:
    """KL both ways between the truth and Gaussians fitted to the samples of each mode.

    For many dimensions, where no density can be estimated. With v the modes' shares among the
    samples, w their true weights and q_k the Gaussian with the moments of mode k's samples,

        KL(q || p) = sum_k v_k [log v_k / w_k + KL(q_k || p_k)]

    and likewise the other way; exact for mixtures of separate Gaussians. What is lacking is how far
    each mode is from Gaussian: by the Pythagorean identity KL(q || p) is larger by that much. The
    covariances' sampling errors would add d (d + 3) / 4 n_k to each KL; for Gaussian modes their
    mean is known (Wishart's moments) and taken off, so that the numbers have no bias, and may be
    negative where q = p.

    Args:
        samples: floating-point samples [n, d].
        truth: the mixture, whose modes should not overlap.

    Raises:
        ValueError: no samples, another number of dimensions, or non-finite samples.
    """
    belongs, _ = _assign(samples, truth)
    d, count = truth.dimensions, len(truth.means)
    weights = truth.log_weights.exp().double().tolist()
    reverse = forward = 0.0
    for k in range(count):
        own = samples[belongs == k].double()
        n, share = len(own), len(own) / len(samples)
        if n < d + 3:
            forward = math.inf
            reverse += share * math.log(share / weights[k]) if share else 0.0
            continue
        toward, back = _unbiased_kl(own, truth.means[k].double(), truth.covariances[k].double())
        reverse += share * (math.log(share / weights[k]) + toward)
        forward += weights[k] * (math.log(weights[k] / share) + back)
    return FittedModes(reverse, forward)


def _unbiased_kl(samples: Tensor, mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    """KL(q || p) and KL(p || q) of Gaussian samples of q [n, d], without the sampling's bias.

    E of the fits' KL is taken apart by Wishart's moments: with n - 1 = f degrees of freedom,
    E log|S| = log|C| + sum_i psi((f + 1 - i) / 2) - d log(f / 2), E S^-1 = C^-1 f / (f - d - 1),
    and the mean's own variance adds C / n to its square.
    """
    n, d = samples.shape
    f = n - 1
    fit_mean, fit = samples.mean(0), samples.T.cov()
    levels = (f + 1 - torch.arange(1, d + 1, dtype=torch.float64)) / 2
    log_bias = float(torch.digamma(levels).sum()) - d * math.log(f / 2)
    toward = gaussian_kl(fit_mean, fit, mean, covariance)
    # 1/2 [tr(P S) + |m - mu|_P^2 - d - log|P S|], P the truth's precision
    trace = float(torch.linalg.solve(covariance, fit).trace())
    toward += 0.5 * log_bias - 0.5 * trace / n
    shift = (fit_mean - mean)[:, None]
    quadratic = float(
        (torch.linalg.solve(fit, covariance).trace())
        + (shift.T @ torch.linalg.solve(fit, shift)).squeeze()
    )
    back = gaussian_kl(mean, covariance, fit_mean, fit)
    shrink = (f - d - 1) / f
    back += 0.5 * ((shrink - 1) * quadratic - d / n) - 0.5 * log_bias
    return toward, back
