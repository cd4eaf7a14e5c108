"""`ResidualCritic`: an exact denoiser, and a network for what the student's samples differ in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill.diffusion import X0, Parametrisation
from fastdistill.models.analytic import ExactDenoiser
from fastdistill.models.denoiser import Condition, Denoiser


class ResidualNetwork(nn.Module):
    """The network of a `ResidualCritic`: raw output D_exact(x_t) + b F(c_in x_t).

    Args:
        base: the exact denoiser; not registered, as it has nothing to train or to save.
        trained: gives the network F and its coefficients b and c_in.
    """

    def __init__(self, base: ExactDenoiser, trained: Denoiser) -> None:
        super().__init__()
        self._base = (base,)
        self.trained = trained

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what `features` returns, for one sample."""
        return self.trained.network.feature_shapes

    def forward(
        self, model_input: Tensor, noise_condition: Tensor, condition: Condition = None
    ) -> Tensor:
        """The denoised samples of x_t [B, d] at times [B]."""
        return self.forward_with_features(model_input, noise_condition, condition, True)[0]

    def features(
        self, model_input: Tensor, noise_condition: Tensor, condition: Condition = None
    ) -> list[Tensor]:
        """Features that the trained network has of x_t."""
        x, noise = self._input(model_input, noise_condition)
        return self.trained.network.features(x, noise, condition)

    def forward_with_features(
        self,
        model_input: Tensor,
        noise_condition: Tensor,
        condition: Condition = None,
        output_graph: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """The denoised samples, with a graph if asked for, and the trained network's features."""
        x, noise = self._input(model_input, noise_condition)
        raw, features = self.trained.network.forward_with_features(
            x, noise, condition, output_graph
        )
        with torch.set_grad_enabled(output_graph and torch.is_grad_enabled()):
            base = self._base[0].network(model_input, noise_condition)
            b = self.trained.level(noise_condition).coefficients.b
            return base + b[:, None] * raw, features

    def _input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self.trained.level(t)
        scale = level.input_scale
        return x_t if scale is None else scale[:, None] * x_t, level.noise_condition


class ResidualCritic(Denoiser):
    """D = D_exact + b F: where student and teacher agree, the network has nothing to say.

    A critic that learns all of a denoiser errs everywhere, and the student settles where teacher
    and critic agree, errors included. This one begins at the teacher, and its part of the
    difference D_critic - D_teacher is formed without cancellation.

    Args:
        base: the exact denoiser of the teacher.
        trained: a denoiser of the same process, whose network's output is silenced here.
    """

    def __init__(self, base: ExactDenoiser, trained: Denoiser) -> None:
        trained.network.silence()
        super().__init__(ResidualNetwork(base, trained), base.process, X0())

    @property
    def loss_space(self) -> Parametrisation:
        """That of the network, in which its target has unit weight."""
        return self.network.trained.parametrisation
