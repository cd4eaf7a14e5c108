"""Vendi score: the effective number of different samples in a set.

Friedman and Dieng 2022 (arXiv 2210.02410), with the orders q of Pasarkar and Dieng 2023
(arXiv 2310.12952). For a positive semi-definite similarity K with K_ii = 1 and
lambda the eigenvalues of K / n:

    VS_q = (sum lambda^q)^{1 / (1 - q)},  VS_1 = exp(-sum lambda log lambda),
    VS_2 = n^2 / |K|_F^2,  VS_inf = 1 / max lambda,  VS_0 = rank K

From 1 (all samples alike) to n (all different). Small orders count rare kinds of samples as much as
common ones, large orders see the common ones. The value depends on n: compare at the same n only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.evaluate._arguments import check_features
from fastdistill.evaluate._threads import SMALL_WIDTH, one_thread

ROWS_AT_ONCE = 8192
_EPS = torch.finfo(torch.float64).eps


def vendi_score(features: Tensor, order: float = 1.0) -> float:
    """Vendi score with the cosine similarity of features.

    With X the features scaled to unit rows, X X^T [n, n] and X^T X [d, d] have the same non-zero
    eigenvalues: the smaller is decomposed, in float64. Order 2 needs no decomposition.

    Args:
        features: floating-point features [n, d].
        order: q >= 0, math.inf included.

    Returns:
        The score, in [1, min(n, d)].

    Raises:
        ValueError: no samples, non-finite features, a sample of zeros (it has no direction), or an
            order that is negative or nan.
    """
    _check_order(order)
    check_features("features", features, rows=1)
    # Rounding the features' storage perturbs unit rows by eps each, so |X|^2 / n by at most eps^2.
    noise = torch.finfo(features.dtype).eps ** 2
    with one_thread(when=min(features.shape) <= SMALL_WIDTH):
        gram = _smaller_gram(features.detach())  # [min(n, d), min(n, d)]
        if order == 2.0:
            return float(1.0 / gram.square().sum())
        return _score(gram, max(features.shape), noise, order)


def vendi_score_from_kernel(kernel: Tensor, order: float = 1.0) -> float:
    """Vendi score of a similarity matrix.

    Args:
        kernel: floating-point similarities [n, n]: symmetric, positive semi-definite, ones on the
            diagonal, all up to rounding. Order 2 does not check that it is semi-definite.
        order: q >= 0, math.inf included.

    Returns:
        The score, in [1, n].

    Raises:
        ValueError: a kernel that is not as described, or an order that is negative or nan.
    """
    _check_order(order)
    check_features("kernel", kernel, rows=1)
    n = kernel.shape[0]
    if kernel.shape != (n, n):
        raise ValueError(f"kernel has shape {tuple(kernel.shape)}; expected [n, n]")
    eps = torch.finfo(kernel.dtype).eps
    kernel = kernel.detach().double()
    if (kernel.diagonal() - 1.0).abs().max() > eps**0.5:
        raise ValueError("kernel has a diagonal other than 1: a sample must be like itself")
    if (kernel - kernel.T).abs().max() > eps**0.5:
        raise ValueError("kernel is not symmetric")
    if order == 2.0:
        return float(n**2 / kernel.square().sum())
    # n^2 independent roundings have spectral norm of about sqrt(n) eps.
    return _score(kernel / n, n, eps / math.sqrt(n), order)


def _check_order(order: float) -> None:
    if not order >= 0.0:
        raise ValueError(f"order is {order}; expected 0 or more")


def _smaller_gram(features: Tensor) -> Tensor:
    """X^T X / n [d, d] if d < n, else X X^T / n [n, n], with X the unit rows, in float64."""
    n, d = features.shape
    if d >= n:
        rows = _unit(features)
        return rows @ rows.T / n
    gram = torch.zeros(d, d, dtype=torch.float64, device=features.device)
    for chunk in features.split(ROWS_AT_ONCE):
        rows = _unit(chunk)
        gram.addmm_(rows.T, rows, alpha=1.0 / n)
    return gram


def _unit(features: Tensor) -> Tensor:
    """Rows of features [n, d] scaled to length one, in float64."""
    rows = features.double()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # [n, 1]
    if (norms == 0.0).any():
        raise ValueError("features have a row of zeros: it has no direction to compare")
    return rows / norms


def _score(matrix: Tensor, size: int, noise: float, order: float) -> float:
    """Score from K / n or a matrix with the same non-zero eigenvalues, all float64.

    Eigenvalues at the level of rounding (``noise`` of the storage, ``size`` eps of the
    decomposition) are zeros: a small order would count each of them as a kind of sample.
    """
    with one_thread(when=matrix.shape[0] <= SMALL_WIDTH):
        values = torch.linalg.eigvalsh(matrix)
    largest = float(values[-1])
    if float(values[0]) < -1e-3 * largest:
        raise ValueError(
            f"kernel has the negative eigenvalue {float(values[0]):.3g} (largest {largest:.3g}); "
            "expected a positive semi-definite matrix"
        )
    values = values[values > max(noise, size * _EPS * largest)]
    if order == math.inf:
        return 1.0 / largest
    if order == 0.0:
        return float(values.numel())
    if abs(order - 1.0) < 1e-8:  # the general formula would divide rounding by order - 1
        return float((-values * values.log()).sum().exp())
    return float((torch.logsumexp(order * values.log(), 0) / (1.0 - order)).exp())
