"""`Gaussian` and `GaussianMixture`: fitted data distributions with exact denoisers.

For data N(mu, U diag(lambda) U^T + floor (I - U U^T)) the score, the denoiser and the probability-
flow ODE are affine in x_t at every noise level of every process (arXiv 2412.09726), and
`fastdistill.ops.gaussian_transport` computes them. Statistics are of x_0, so that one fit serves
EDM, VP and rectified flow alike.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.diffusion.samplers import Teleport
from fastdistill.ops import gaussian_denoise, gaussian_transport

Level = Tensor | float
"""A coefficient of the process: one number, or one a sample [B]."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """What is known of how a Gaussian was fitted; saved beside it."""

    samples: int
    """Number of samples."""
    source: str = ""
    """What they were."""
    scaling: str = "samples as they are"
    """What was done to them, as "pixels from [0, 1] to [-1, 1]"."""
    process: dict[str, Any] | None = None
    """The process of the teacher that it was fitted for, as a recipe writes it."""
    total_variance: float = 0.0
    """Sum of the variances of all elements: the trace of the covariance."""
    left_out: tuple[float, ...] = ()
    """Share of the total variance outside the first 0, 1, ..., r directions."""
    sketch_error: float = 0.0
    """Share of the total variance that a one-pass sketch missed altogether; 0 for exact fits."""


class _Teleporting(nn.Module, abc.ABC):
    """What can be carried along its own probability-flow ODE."""

    @abc.abstractmethod
    def transport(
        self, x: Tensor, alpha: Level, sigma: Level, to_alpha: Level, to_sigma: Level
    ) -> Tensor:
        """x of its trajectory at another level  # [B, ...]"""

    def marginal(self, noise: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Samples of the marginal at (alpha, sigma), from standard normal noise  # [B, ...]

        That is N(alpha mu, alpha^2 C + sigma^2 I), where pure noise would be N(0, sigma^2 I).
        """
        return self.transport(noise, 0.0, 1.0, alpha, sigma)

    def forward(self, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """`marginal`, so that it is a student's start."""
        return self.marginal(noise, alpha, sigma)

    def teleport(self, skip: int) -> Teleport:
        """A start for `heun` and `deterministic` that passes the first ``skip`` steps in one map.

        Raises:
            ValueError: for a negative ``skip``, and (when called) one that leaves no step.
        """
        if skip < 0:
            raise ValueError(f"skip is {skip}; expected a number of steps, 0 or more")

        def carry(x: Tensor, sigmas: Sequence[float]) -> tuple[Tensor, Sequence[float]]:
            if skip >= len(sigmas) - 1:
                raise ValueError(
                    f"skip is {skip}, which leaves none of {len(sigmas) - 1} steps; skip fewer"
                )
            return self.transport(x, 1.0, sigmas[0], 1.0, sigmas[skip]), sigmas[skip:]

        return carry


class Gaussian(_Teleporting):
    """N(mean, U diag(variances) U^T + floor (I - U U^T)), a distribution of clean samples.

    Args:
        mean: [*shape], the shape of one sample.
        basis: U [d, r], orthonormal principal directions; r may be 0.
        variances: variances along them [r].
        floor: variance in all directions that U leaves out.
        fit: where it comes from.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, negative variances and
            a basis that is not orthonormal.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor

    def __init__(
        self,
        mean: Tensor,
        basis: Tensor,
        variances: Tensor,
        floor: float = 0.0,
        fit: Fit | None = None,
    ) -> None:
        super().__init__()
        _check(mean, basis, variances, floor)
        for name, value in (("mean", mean), ("basis", basis), ("variances", variances)):
            self.register_buffer(name, value, persistent=False)  # no weights of a network
        self.floor = float(floor)
        self.fit = fit or Fit(samples=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.mean.shape)

    @property
    def rank(self) -> int:
        """Number of principal directions."""
        return len(self.variances)

    def rescaled(self, factor: float, offset: float = 0.0) -> Gaussian:
        """The distribution of factor x + offset: as ``rescaled(2, -1)`` for [0, 1] to [-1, 1].

        mu becomes factor mu + offset and every variance factor^2 times itself.
        """
        square = factor**2
        fit = dataclasses.replace(self.fit, total_variance=square * self.fit.total_variance)
        mean, variances = factor * self.mean + offset, square * self.variances
        return Gaussian(mean, self.basis, variances, square * self.floor, fit)

    def truncated(self, rank: int) -> Gaussian:
        """The first ``rank`` directions; the variance of the others is spread over the floor.

        Raises:
            ValueError: for more directions than there are.
        """
        if not 0 <= rank <= self.rank:
            raise ValueError(f"rank is {rank}; expected 0 to {self.rank}, the directions fitted")
        rest = self.mean.numel() - rank
        kept = self.floor * (self.mean.numel() - self.rank) + float(self.variances[rank:].sum())
        floor = kept / rest if rest else 0.0
        fit = dataclasses.replace(self.fit, left_out=self.fit.left_out[: rank + 1])
        return Gaussian(self.mean, self.basis[:, :rank], self.variances[:rank], floor, fit)

    def transport(
        self, x: Tensor, alpha: Level, sigma: Level, to_alpha: Level, to_sigma: Level
    ) -> Tensor:
        """Samples carried along the probability-flow ODE to another noise level  # [B, ...]

        x' = alpha' mu + U sqrt((alpha'^2 lambda + sigma'^2) / (alpha^2 lambda + sigma^2))
        U^T (x - alpha mu), between any two levels of any processes.

        Args:
            x: samples at (alpha, sigma) [B, *shape].
            alpha: signal coefficient, a number or [B]; as the other three.
            sigma: noise coefficient.
            to_alpha: signal coefficient to go to.
            to_sigma: noise coefficient to go to.

        Raises:
            ValueError: for samples of another shape.
        """
        start, end = (_levels(x, *pair) for pair in ((alpha, sigma), (to_alpha, to_sigma)))
        mean, basis, variances = self._statistics(x)
        return gaussian_transport(x, mean, basis, variances, *start, *end, self.floor).x

    def denoise(self, x: Tensor, alpha: Level, sigma: Level, labels: Any = None) -> Tensor:
        """E[x_0 | x_t = x], the exact denoiser  # [B, ...]

        Args:
            x: samples at (alpha, sigma) [B, *shape].
            alpha: signal coefficient, a number or [B].
            sigma: noise coefficient, a number or [B].
            labels: not read; a mixture with classes reads them.
        """
        mean, basis, variances = self._statistics(x)
        return gaussian_denoise(x, mean, basis, variances, *_levels(x, alpha, sigma), self.floor)

    def log_density(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Log of the marginal's density at x, in float32 or wider  # [B]"""
        mean, basis, variances = self._statistics(x)
        a, s = (value[:, None] for value in _levels(x, alpha, sigma))
        centred = x.flatten(1).to(mean.dtype) - a * mean.flatten()
        squares = (centred @ basis).square()
        along, rest = a**2 * variances + s**2, (a**2 * self.floor + s**2)[:, 0]
        left = (centred.square().sum(1) - squares.sum(1)).clamp(min=0)
        count = mean.numel()
        volume = along.log().sum(1) + (count - self.rank) * rest.log() + count * _LOG_2PI
        return -0.5 * (volume + (squares / along).sum(1) + left / rest)

    def sample(self, noise: Tensor) -> Tensor:
        """Clean samples from standard normal noise  # [B, *shape]"""
        return self.marginal(noise, 1.0, 0.0)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, basis and variances in the dtype that maps of x are formed in."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"samples have shape {list(x.shape[1:])}, but the Gaussian is of {list(self.shape)}"
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.mean.to(dtype), self.basis.to(dtype), self.variances.to(dtype)


class GaussianMixture(nn.Module):
    """sum_k pi_k N(mu_k, C_k): one Gaussian a class or a cluster.

    The denoiser is the components' own, weighted by their posterior
    probabilities; for samples whose class is known, its component's alone. Costs K times a
    Gaussian's.

    Args:
        components: Gaussians of one shape.
        weights: their shares of the data [K], which sum to 1.
        by_class: whether component k is class k, so that conditions choose it.

    Raises:
        ValueError: for weights that are no probabilities, and components of different shapes.
    """

    log_weights: Tensor

    def __init__(
        self, components: Sequence[Gaussian], weights: Tensor, by_class: bool = False
    ) -> None:
        super().__init__()
        if len({component.shape for component in components}) != 1:
            raise ValueError("a mixture needs components of one shape, and at least one")
        total = weights.double().sum()
        if len(weights) != len(components) or not (weights > 0).all() or abs(total - 1) > 1e-6:
            raise ValueError(
                f"weights are {weights.tolist()}; expected {len(components)} positive ones that "
                "sum to 1"
            )
        self.components = nn.ModuleList(components)
        self.register_buffer("log_weights", weights.log(), persistent=False)
        self.by_class = by_class

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self[0].shape

    def __len__(self) -> int:
        return len(self.components)

    def __getitem__(self, k: int) -> Gaussian:
        component = self.components[k]
        assert isinstance(component, Gaussian)
        return component

    def denoise(self, x: Tensor, alpha: Level, sigma: Level, labels: Any = None) -> Tensor:
        """E[x_0 | x_t = x], and with labels E[x_0 | x_t = x, class]  # [B, ...]

        Args:
            x: samples at (alpha, sigma) [B, *shape].
            alpha: signal coefficient, a number or [B].
            sigma: noise coefficient, a number or [B].
            labels: int64 [B], of a mixture of classes; the number of classes is the null class,
                whose distribution is the whole mixture. Others do not read them.
        """
        posterior = self.posterior(x, alpha, sigma, labels)
        shape = (-1, *[1] * (x.ndim - 1))
        denoised = torch.zeros_like(x, dtype=posterior.dtype)
        for k in range(len(self)):
            one = self[k].denoise(x, alpha, sigma)
            denoised = denoised + posterior[:, k].reshape(shape) * one
        return denoised.to(x.dtype)

    def posterior(self, x: Tensor, alpha: Level, sigma: Level, labels: Any = None) -> Tensor:
        """Probability of each component given x_t, and the class where it is known  # [B, K]"""
        densities = [self[k].log_density(x, alpha, sigma) for k in range(len(self))]
        stacked = torch.stack(densities, dim=1)
        logits = stacked + self.log_weights.to(stacked.dtype)
        if self.by_class and labels is not None:
            known = torch.arange(len(self), device=x.device)
            other = (labels[:, None] != known) & (labels[:, None] < len(self))
            logits = logits.masked_fill(other, -math.inf)
        return logits.softmax(dim=1)

    def given(self, labels: Tensor) -> LabelledGaussian:
        """The Gaussian of each sample's class, which can be teleported as a mixture cannot.

        Args:
            labels: int64 [B] on the host or a device; read here, so not for a training step.

        Raises:
            ValueError: for a mixture of clusters, and labels that are no class.
        """
        if not self.by_class:
            raise ValueError("the mixture's components are clusters, not classes; fit by class")
        return LabelledGaussian(self, labels)


class LabelledGaussian(_Teleporting):
    """Each sample's own component of a mixture of classes; made by `GaussianMixture.given`."""

    def __init__(self, mixture: GaussianMixture, labels: Tensor) -> None:
        super().__init__()
        present = labels.unique().tolist()
        if not present or min(present) < 0 or max(present) >= len(mixture):
            raise ValueError(
                f"labels are {present}; expected some of the {len(mixture)} classes fitted"
            )
        self.mixture, self.labels = mixture, labels
        self._rows = {k: (labels == k).nonzero().flatten() for k in present}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.mixture.shape

    def transport(
        self, x: Tensor, alpha: Level, sigma: Level, to_alpha: Level, to_sigma: Level
    ) -> Tensor:
        """As `Gaussian.transport`, by each sample's class.

        Samples that come several times over, as for guidance, have the same labels in each copy.
        """
        copies, extra = divmod(len(x), len(self.labels))
        if extra or copies == 0:
            raise ValueError(f"{len(x)} samples were given, but {len(self.labels)} labels")
        levels = [_level(x, value) for value in (alpha, sigma, to_alpha, to_sigma)]
        result = torch.empty_like(x)
        for k, rows in self._rows.items():
            at = torch.cat([rows.to(x.device) + copy * len(self.labels) for copy in range(copies)])
            chosen = (level[at] for level in levels)
            result[at] = self.mixture[k].transport(x[at], *chosen)
        return result


_LOG_2PI = math.log(2 * math.pi)
_ORTHONORMAL = 5e-3
"""How far U^T U may be from the identity: as far as a bfloat16 one is."""


def _level(x: Tensor, value: Level) -> Tensor:
    """One number a sample, in float32 or wider  # [B]"""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(value, Tensor) and value.ndim > 0:
        return value.to(x.device, dtype)
    return torch.full((len(x),), float(value), device=x.device, dtype=dtype)


def _levels(x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
    return _level(x, alpha), _level(x, sigma)


def _check(mean: Tensor, basis: Tensor, variances: Tensor, floor: float) -> None:
    d, r = mean.numel(), len(variances)
    if basis.shape != (d, r) or variances.ndim != 1 or r > d or mean.ndim == 0 or d == 0:
        raise ValueError(
            f"mean {tuple(mean.shape)}, basis {tuple(basis.shape)} and variances "
            f"{tuple(variances.shape)} do not fit: expected [*shape] of d elements, [d, r], [r]"
        )
    for name, value in (("mean", mean), ("basis", basis), ("variances", variances)):
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite floating-point numbers")
    if (variances < 0).any() or not 0 <= floor < math.inf:
        raise ValueError(
            f"variances go down to {float(variances.min()) if r else 0} with floor {floor}; a "
            "variance is finite and not negative"
        )
    if r == 0:
        return
    wide = basis.to(torch.promote_types(basis.dtype, torch.float32))
    gram = wide.T @ wide
    defect = float((gram - torch.eye(r, dtype=gram.dtype, device=gram.device)).abs().max())
    if defect > _ORTHONORMAL:
        raise ValueError(f"the basis is not orthonormal: U^T U is {defect:.2g} off the identity")
