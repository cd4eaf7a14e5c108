"""`ExactDenoiser`: a Gaussian or a mixture as a teacher that makes no mistake."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill.diffusion import X0, GaussianMixture, Process
from fastdistill.models.denoiser import Condition, Denoiser


class ExactNetwork(nn.Module):
    """The network of an `ExactDenoiser`: raw output F = D = E[x_0 | x_t].

    Args:
        mixture: the data.
        process: turns the times that the network is told into noise levels.
        trained: a denoiser of the same process, whose features a discriminator reads: exact scores
            come from no layers. None leaves the network without features.
    """

    def __init__(
        self, mixture: GaussianMixture, process: Process, trained: Denoiser | None = None
    ) -> None:
        super().__init__()
        self.mixture, self.process, self.trained = mixture, process, trained

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what `features` returns, for one sample."""
        return self._trained().network.feature_shapes

    def forward(
        self, model_input: Tensor, noise_condition: Tensor, condition: Condition = None
    ) -> Tensor:
        """D(x_t, t) of x_t [B, d] at times [B]; the condition is not looked at."""
        return self.mixture.denoise(
            model_input, *self.process.alpha_sigma(noise_condition)
        ).denoised

    def features(
        self, model_input: Tensor, noise_condition: Tensor, condition: Condition = None
    ) -> list[Tensor]:
        """Features that the trained denoiser has of x_t."""
        trained = self._trained()
        level = trained.level(noise_condition)
        scale = level.input_scale
        x = model_input if scale is None else scale[:, None] * model_input
        return trained.network.features(x, level.noise_condition, condition)

    def forward_with_features(
        self,
        model_input: Tensor,
        noise_condition: Tensor,
        condition: Condition = None,
        output_graph: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """D, with a graph if asked for, and the trained denoiser's features."""
        with torch.set_grad_enabled(output_graph and torch.is_grad_enabled()):
            denoised = self(model_input, noise_condition, condition)
        return denoised, self.features(model_input, noise_condition, condition)

    def _trained(self) -> Denoiser:
        if self.trained is None:
            raise ValueError(
                "exact scores have no features for a discriminator; give ExactNetwork a trained "
                "denoiser, or choose a method without a discriminator on the teacher's features"
            )
        return self.trained


class ExactDenoiser(Denoiser):
    """A mixture's denoiser in a process, and everything else that is known of it.

    Times are in the process' clock, one a sample [B]; x_t are [B, d].

    Args:
        mixture: the data; a mixture of one is a Gaussian.
        process: the forward process.
        trained: gives a discriminator its features (see `ExactNetwork`).
    """

    def __init__(
        self, mixture: GaussianMixture, process: Process, trained: Denoiser | None = None
    ) -> None:
        super().__init__(ExactNetwork(mixture, process, trained), process, X0())

    @property
    def mixture(self) -> GaussianMixture:
        """The data."""
        return self.network.mixture

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t)  # [B]"""
        return self.mixture.log_density(x_t, *self.process.alpha_sigma(t))

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t)  # [B, d]"""
        return self.mixture.score(x_t, *self.process.alpha_sigma(t))

    def transport(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """x_r on the trajectory of the probability-flow ODE through x_t  # [B, d]"""
        levels = (*self.process.alpha_sigma(t), *self.process.alpha_sigma(r))
        return self.mixture.transport(x_t, *levels)

    def consistency(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The consistency function f(x_t, t): the clean sample of x_t's trajectory  # [B, d]"""
        alpha, sigma = self.process.alpha_sigma(t)
        clean = torch.ones_like(alpha), torch.zeros_like(sigma)
        return self.mixture.transport(x_t, alpha, sigma, *clean)

    def average_velocity(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """MeanFlow's u(x_t, r, t) = (x_t - x_r) / (t - r) (arXiv 2505.13447), r < t  # [B, d]"""
        return (x_t - self.transport(x_t, t, r)) / (t - r)[:, None]
