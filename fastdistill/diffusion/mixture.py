"""`GaussianMixture`: data of which everything that diffusion makes of them is known exactly.

For p_0 = sum_k w_k N(m_k, C_k) and x_t = alpha x_0 + sigma eps, p_t is the mixture of the
N(alpha m_k, alpha^2 C_k + sigma^2 I). Denoiser, score and density are closed forms (op
`mixture_denoise`). The probability-flow ODE has one for a single Gaussian (op `gaussian_transport`,
arXiv 2412.09726); mixtures are integrated by `integrate`, in the variables

    u = x / (alpha^2 + sigma^2)^{1/2},  theta = atan2(sigma, alpha),
    du/dtheta = -sin(theta) (D + cos(theta) s),

with D and s at (cos theta, sin theta), in which every process has the same ODE, and neither pure
noise nor clean data is a singular point.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdistill.diffusion.noise import Noise
from fastdistill.diffusion.ode import integrate
from fastdistill.ops import gaussian_transport, mixture_denoise
from fastdistill.ops.mixture import MixtureDenoised

_SAMPLED_AT_ONCE = 2**22


class Drawn(NamedTuple):
    """Samples of a mixture."""

    samples: Tensor
    """[n, d]"""
    components: Tensor
    """Which component each comes from, int64 [n]"""


class GaussianMixture(nn.Module):
    """sum_k w_k N(m_k, C_k) in d dimensions; one component makes a Gaussian.

    A module without parameters, so that its numbers move with the network that holds it. What it
    computes has the dtype of x: float64 for a reference, float32 in training.

    Args:
        means: m_k [K, d].
        covariances: C_k [K, d, d], or variances along the coordinates [K, d].
        weights: positive, of any sum [K]; equal if None.
        dtype: of the numbers held; results are no more precise.

    Raises:
        ValueError: for shapes that do not belong together, covariances that are not symmetric and
            positive, or weights that are not positive.
    """

    def __init__(
        self,
        means: Tensor,
        covariances: Tensor,
        weights: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        means, covariances = means.double(), covariances.double()
        if means.ndim != 2 or covariances.shape not in (
            means.shape,
            (*means.shape, means.shape[1]),
        ):
            raise ValueError(
                f"means {tuple(means.shape)} and covariances {tuple(covariances.shape)} do not "
                "belong together; expected [K, d], and [K, d, d] or variances [K, d]"
            )
        if covariances.ndim == 2:
            covariances = covariances.diag_embed()
        weights = means.new_ones(len(means)) if weights is None else weights.double()
        if weights.shape != means.shape[:1] or not (weights > 0).all():
            raise ValueError(f"weights are {weights.tolist()}; expected {len(means)} positive ones")
        log_weights = (weights / weights.sum()).log()
        factors = torch.stack([_factor(covariance) for covariance in covariances])
        self.means: Tensor
        self.covariances: Tensor
        self.log_weights: Tensor
        self.factors: Tensor
        for name, value in {
            "means": means,
            "covariances": covariances,
            "log_weights": log_weights,
            "factors": factors,  # C_k = L_k L_k^T
        }.items():
            self.register_buffer(name, value.to(dtype), persistent=False)
        groups = _groups(means, covariances, log_weights, dtype)
        self._groups = nn.ModuleList(groups)
        places = torch.tensor([k for group in groups for k in group.components])
        self.order: Tensor
        self.register_buffer("order", places.argsort(), persistent=False)

    @property
    def dimensions(self) -> int:
        """Numbers of one sample."""
        return self.means.shape[1]

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> MixtureDenoised:
        """Denoiser, log density and posterior of the components at x_t.

        Differentiable in x, once.

        Args:
            x: noisy samples [B, d].
            alpha: signal coefficient of each [B].
            sigma: noise coefficient of each [B].

        Raises:
            ValueError: for samples of another number of dimensions.
        """
        if x.ndim != 2 or x.shape[1] != self.dimensions:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, {self.dimensions}]")
        parts = [group(x, alpha, sigma) for group in self._groups]
        if len(parts) == 1:
            return parts[0]
        logits = torch.stack([part.log_density for part in parts], dim=1)  # [B, groups]
        share = logits.softmax(dim=1)
        denoised = sum(
            share[:, g, None].to(x.dtype) * part.denoised for g, part in enumerate(parts)
        )
        posterior = [share[:, g, None] * part.posterior for g, part in enumerate(parts)]
        assert isinstance(denoised, Tensor)
        return MixtureDenoised(
            denoised, logits.logsumexp(dim=1), torch.cat(posterior, dim=1)[:, self.order]
        )

    def log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p_t(x_t)  # [B]"""
        return self.denoise(x, alpha, sigma).log_density

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """grad log p_t(x_t), without a graph  # [B, d]"""
        return self._denoised_and_score(x, alpha, sigma)[1]

    def sample(self, noise: Noise, index: Tensor, stream: str = "mixture") -> Drawn:
        """Samples with these global indices, at the noise's step.

        Args:
            noise: source of randomness.
            index: int64 [n].
            stream: name of the two streams that are read, its component's and its noise.
        """
        dtype = self.means.dtype
        uniform = noise.uniform(f"{stream}-component", index)
        edges = self.log_weights.exp().cumsum(0)[:-1].to(uniform.dtype)
        chosen = torch.searchsorted(edges, uniform, right=True)  # [n]
        eps = noise.normal(f"{stream}-sample", index, (self.dimensions,)).to(dtype)
        # Row by row, and not as a product of matrices, whose rounding would depend on n.
        rows = max(1, _SAMPLED_AT_ONCE // self.dimensions**2)
        spread = [
            (self.factors[own] * draws[:, None, :]).sum(dim=2)
            for own, draws in zip(chosen.split(rows), eps.split(rows), strict=True)
        ]
        return Drawn(self.means[chosen] + torch.cat(spread), chosen)

    def transport(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        to_alpha: Tensor,
        to_sigma: Tensor,
        tolerance: float | None = None,
    ) -> Tensor:
        """Carry samples along the probability-flow ODE from one noise level to another.

        Args:
            x: samples at (alpha, sigma) [B, d].
            alpha: signal coefficient of each [B].
            sigma: noise coefficient of each [B].
            to_alpha: signal coefficient to go to [B].
            to_sigma: noise coefficient to go to [B].
            tolerance: of the solver, for mixtures; 1e-9 in float64 and 1e-5 in float32 if None.

        Returns:
            Samples at (to_alpha, to_sigma), without a graph for mixtures  # [B, d]
        """
        if len(self.means) == 1:
            values, vectors = torch.linalg.eigh(self.covariances[0])
            levels = (alpha, sigma, to_alpha, to_sigma)
            return gaussian_transport(x, self.means[0], vectors, values.clamp(min=0), *levels).x
        if tolerance is None:
            tolerance = 1e-9 if x.dtype == torch.float64 else 1e-5
        start, end = torch.atan2(sigma, alpha), torch.atan2(to_sigma, to_alpha)

        def velocity(u: Tensor, s: float) -> Tensor:
            theta = start + s * (end - start)
            cos, sin = theta.cos(), theta.sin()
            denoised, score = self._denoised_and_score(u, cos, sin)
            return ((start - end) * sin)[:, None] * (denoised + cos[:, None] * score)

        unit = x.detach() / torch.hypot(alpha, sigma)[:, None]
        return torch.hypot(to_alpha, to_sigma)[:, None] * integrate(velocity, unit, tolerance)

    def _denoised_and_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """D and, as the op's own gradient of the density, s: no difference of large numbers."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            result = self.denoise(x, alpha, sigma)
            (score,) = torch.autograd.grad(result.log_density.sum(), x)
        return result.denoised.detach(), score


class _Group(nn.Module):
    """Components that share their principal axes: one call of the op."""

    def __init__(
        self,
        components: list[int],
        means: Tensor,
        variances: Tensor,
        axes: Tensor | None,
        log_weights: Tensor,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.components = components
        rotated = means if axes is None else means @ axes
        self.axes: Tensor | None
        self.means: Tensor
        self.variances: Tensor
        self.log_weights: Tensor
        self.register_buffer("axes", None if axes is None else axes.to(dtype), persistent=False)
        self.register_buffer("means", rotated.to(dtype), persistent=False)
        self.register_buffer("variances", variances.to(dtype), persistent=False)
        self.register_buffer("log_weights", log_weights.to(dtype), persistent=False)

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> MixtureDenoised:
        if self.axes is None:
            return mixture_denoise(x, alpha, sigma, self.means, self.variances, self.log_weights)
        axes = self.axes.to(x.dtype)
        result = mixture_denoise(
            x @ axes, alpha, sigma, self.means, self.variances, self.log_weights
        )
        return result._replace(denoised=result.denoised @ axes.T)


def _groups(
    means: Tensor, covariances: Tensor, log_weights: Tensor, dtype: torch.dtype
) -> list[_Group]:
    """Components along the coordinates together, every other one by itself."""
    diagonals = covariances.diagonal(dim1=1, dim2=2)
    plain = [k for k, c in enumerate(covariances) if torch.equal(c, c.diagonal().diag())]
    groups = []
    if plain:
        groups.append(
            _Group(plain, means[plain], diagonals[plain], None, log_weights[plain], dtype)
        )
    for k in sorted(set(range(len(means))) - set(plain)):
        values, axes = torch.linalg.eigh(covariances[k])
        spectrum = values.clamp(min=0)[None]
        groups.append(_Group([k], means[[k]], spectrum, axes, log_weights[[k]], dtype))
    return groups


def _factor(covariance: Tensor) -> Tensor:
    """L with C = L L^T, by eigenvalues, so that C may be singular  # [d, d]"""
    if (covariance - covariance.T).abs().max() > 1e-9 * covariance.abs().max():
        raise ValueError("a covariance is not symmetric")
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -1e-9 * values[-1].abs():
        raise ValueError(
            f"a covariance has the eigenvalue {float(values[0]):.3g}; expected none below 0"
        )
    return vectors * values.clamp(min=0).sqrt()
