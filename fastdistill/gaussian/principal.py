"""Leading eigenpairs of a covariance: of the matrix, or of a one-pass sketch of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_DENSE = 1024
"""Up to here all eigenpairs are computed at once."""
_RESTARTS = 60
_DEPTH = 3
_RESIDUAL = 1e-9


class Principal(NamedTuple):
    """Eigenpairs of a positive semi-definite matrix, the largest first."""

    values: Tensor
    """[r], float64"""
    vectors: Tensor
    """[d, r], float64"""
    seen: float
    """Sum of all the eigenvalues that were found, also of those not asked for."""


def sketching_matrix(dimensions: int, columns: int, seed: int) -> Tensor:
    """Omega, an orthonormalised Gaussian matrix  # [d, k], float64"""
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(dimensions, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(omega).Q


def principal_of_matrix(matrix: Tensor, rank: int) -> Principal:
    """The ``rank`` leading eigenpairs of a symmetric matrix [d, d], to rounding.

    Large matrices go through block Krylov spaces (Musco and Musco 2015, arXiv 1504.05477) that are
    restarted from their Ritz vectors until every residual is 1e-9 of the largest eigenvalue; an
    eigenvalue's own error is of its square.
    """
    dimensions, seen = len(matrix), float(matrix.trace())
    if rank == 0:
        return Principal(matrix.new_zeros(0), matrix.new_zeros(dimensions, 0), seen)
    width = rank + max(8, rank // 4)
    if dimensions > max(_DENSE, 2 * _DEPTH * width):
        found = _krylov(matrix, rank, width)
        if found is not None:
            return Principal(*found, seen)
    values, vectors = torch.linalg.eigh(matrix)
    return Principal(values.flip(0)[:rank], vectors.flip(1)[:, :rank].contiguous(), seen)


def _krylov(matrix: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor] | None:
    """Leading eigenpairs, or None where they do not converge."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), width, generator=generator, dtype=matrix.dtype)
    start = torch.linalg.qr(start).Q
    for _ in range(_RESTARTS):
        basis, image = start, matrix @ start
        newest = image
        for _ in range(_DEPTH - 1):
            for _ in range(2):  # once more for what rounding left
                newest = newest - basis @ (basis.T @ newest)
            newest = torch.linalg.qr(newest).Q
            newest = newest - basis @ (basis.T @ newest)
            newest = torch.linalg.qr(newest).Q
            basis = torch.cat((basis, newest), dim=1)
            newest = matrix @ newest
            image = torch.cat((image, newest), dim=1)
        small = basis.T @ image
        values, turns = torch.linalg.eigh((small + small.T) / 2)
        values, turns = values.flip(0)[:width], turns.flip(1)[:, :width]
        start = basis @ turns
        residual = (image @ turns - start * values)[:, :rank].norm(dim=0).max()
        if residual <= _RESIDUAL * values[0]:
            return values[:rank], start[:, :rank].contiguous()
        start = torch.linalg.qr(start).Q
    return None


def principal_of_sketch(sketch: Tensor, omega: Tensor, rank: int) -> Principal:
    """Leading eigenpairs of C from Y = C Omega [d, k], by the Nystrom approximation.

    Y (Omega^T Y)^-1 Y^T, shifted for stability (Tropp, Yurtsever, Udell and Cevher 2017, arXiv
    1706.05736, algorithm 3). It is never above C, so that trace(C) less ``seen`` is its error in
    the trace norm, exactly. It is C itself where C's rank is at most k.
    """
    scale = sketch.norm()
    if scale == 0:
        empty = sketch.new_zeros(len(sketch), rank)
        return Principal(sketch.new_zeros(rank), empty, 0.0)
    shift = len(sketch) ** 0.5 * torch.finfo(sketch.dtype).eps * scale
    shifted = sketch + shift * omega
    core = omega.T @ shifted
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    if failed:  # rounding: the eigenvalues' own root, without those that are none
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        root = shifted @ (vectors * values.clamp(min=shift).rsqrt())
    else:
        root = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
    vectors, roots, _ = torch.linalg.svd(root, full_matrices=False)
    values = (roots.square() - shift).clamp(min=0)
    return Principal(values[:rank], vectors[:, :rank].contiguous(), float(values.sum()))
