"""Divergences between distributions: closed forms, and estimates from samples.

With densities p (the truth) and q at samples of both,

    KL(q || p) = E_q[log q - log p],   KL(p || q) = E_p[log p - log q],
    JS = 1/2 E_p[log 2p / (p + q)] + 1/2 E_q[log 2q / (p + q)]  in [0, log 2].

A density that is not known is estimated from n samples by the distance rho to the k-th nearest
(Kozachenko and Leonenko 1987; Wang, Kulkarni and Verdu 2009), c_d the unit ball's volume:

    log q(x) = psi(k) - psi(n + 1) - log c_d - d log rho

Its error has variance psi'(k), which is known, and a mean that comes from the density's curvature
within the ball: `neighbour_divergences` takes off what both do to a divergence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.evaluate._arguments import check_features, check_same_width


class Divergences(NamedTuple):
    """How far a generator's law q is from the truth p, in nats."""

    reverse_kl: float
    """KL(q || p): large where samples lie outside the truth"""
    forward_kl: float
    """KL(p || q): large where the truth has no samples"""
    jensen_shannon: float
    """Jensen-Shannon divergence, at most log 2"""


def gaussian_kl(
    mean_p: Tensor, covariance_p: Tensor, mean_q: Tensor, covariance_q: Tensor
) -> float:
    """KL(p || q) of two Gaussians, in float64.

    Args:
        mean_p: [d].
        covariance_p: positive definite [d, d].
        mean_q: [d].
        covariance_q: positive definite [d, d].

    Raises:
        ValueError: for a covariance that is not positive definite.
    """
    given = (mean_p, covariance_p, mean_q, covariance_q)
    mean_p, covariance_p, mean_q, covariance_q = (value.double() for value in given)
    factor_p, factor_q = (_cholesky(value) for value in (covariance_p, covariance_q))
    trace = torch.linalg.solve_triangular(factor_q, factor_p, upper=False).square().sum()
    shift = torch.linalg.solve_triangular(factor_q, (mean_p - mean_q)[:, None], upper=False)
    logs = factor_q.diagonal().log().sum() - factor_p.diagonal().log().sum()
    return float(0.5 * (trace + shift.square().sum() - len(mean_p)) + logs)


def _cholesky(covariance: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        raise ValueError("a covariance is not positive definite: the divergence is infinite")
    return factor


def divergences(
    p_at_p: Tensor, q_at_p: Tensor, p_at_q: Tensor, q_at_q: Tensor, variance: float = 0.0
) -> Divergences:
    """KL both ways and JS from log densities at samples of both laws.

    Args:
        p_at_p: log p at samples of p [n].
        q_at_p: log q there [n].
        p_at_q: log p at samples of q [m].
        q_at_q: log q there [m].
        variance: of the error of log q, where that is an estimate. The averages of the KL do not
            mind it; of JS's curved terms what it adds is taken off, to second order.
    """
    given = (p_at_p, q_at_p, p_at_q, q_at_q)
    p_at_p, q_at_p, p_at_q, q_at_q = (value.double() for value in given)

    def half(log_ratio: Tensor) -> float:
        """Mean of log (1 + e^log_ratio), as it is without the error."""
        share = torch.sigmoid(log_ratio)
        curved = 0.5 * variance * share * (1 - share)
        return float((torch.nn.functional.softplus(log_ratio) - curved).mean())

    return Divergences(
        float((q_at_q - p_at_q).mean()),
        float((p_at_p - q_at_p).mean()),
        math.log(2) - 0.5 * (half(q_at_p - p_at_p) + half(p_at_q - q_at_q)),
    )


def neighbour_log_density(points: Tensor, samples: Tensor | None = None, k: int = 5) -> Tensor:
    """Log density at points by their k-th nearest sample (see the module's docstring).

    Args:
        points: where it is wanted [n, d].
        samples: of the law [m, d]; if None the points are its samples, and each is left out where
            its own density is estimated.
        k: which neighbour: larger ones vary less and blur more.

    Returns:
        Log densities [n], float64; infinite where k samples coincide with a point.

    Raises:
        ValueError: k < 1, k samples or fewer, different d, or non-finite values.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    check_features("points", points, rows=1)
    own = samples is None
    given = points if samples is None else samples
    check_features("samples", given, rows=k + 1)
    check_same_width(points, given)
    d, others = points.shape[1], len(given) - own
    distance = _neighbour_distance(points, given, k + own)
    volume = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)
    counts = torch.digamma(torch.tensor([k, others + 1], dtype=torch.float64))
    return float(counts[0] - counts[1]) - volume - d * distance.log()


def _neighbour_distance(points: Tensor, samples: Tensor, k: int) -> Tensor:
    """Distance of each of the points [n, d] to its k-th nearest of the samples  # [n], float64"""
    from scipy.spatial import KDTree

    tree = KDTree(samples.detach().double().cpu().numpy())
    distance, _ = tree.query(points.detach().double().cpu().numpy(), k=[k])
    return torch.from_numpy(distance[:, 0]).to(points.device)


def neighbour_divergences(
    p_samples: Tensor, q_samples: Tensor, p_at_p: Tensor, p_at_q: Tensor, k: int = 5
) -> Divergences:
    """Divergences of samples from a truth whose density is known, in few dimensions.

    The truth's own density is estimated from its own samples too; the mean error that this shows is
    taken off the estimates of q. So fresh samples of the truth score zero on average, and the
    forward KL is the two-sample estimate of Wang et al.: d mean log(rho_q / rho_p).

    Args:
        p_samples: fresh samples of the truth [n, d].
        q_samples: the generator's [m, d]; best as many.
        p_at_p: the truth's log density at its own samples [n].
        p_at_q: the truth's log density at the generator's samples [m].
        k: of `neighbour_log_density`.

    Raises:
        ValueError: as `neighbour_log_density`.
    """
    error = (neighbour_log_density(p_samples, k=k) - p_at_p.double()).mean()
    q_at_p = neighbour_log_density(p_samples, q_samples, k) - error
    q_at_q = neighbour_log_density(q_samples, k=k) - error
    variance = float(torch.special.polygamma(1, torch.tensor(float(k), dtype=torch.float64)))
    return divergences(p_at_p, q_at_p, p_at_q, q_at_q, variance)
