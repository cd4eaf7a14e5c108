"""Objectives on networks whose answers are known: one-dimensional Gaussians, in float64.

The expectation over z and eps is a Gauss-Hermite quadrature, told to the objective as a batch whose
noise is the nodes and whose cotangents are weighted by the quadrature's weights, so that the only
error is rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from gaussians import Gaussians, random_cases
from torch import Tensor, nn

from fastdistill.diffusion import EDM, VP, X0, FixedList, RectifiedFlow
from fastdistill.models import Denoiser
from fastdistill.objectives import Batch, Objective, Update, denoising
from fastdistill.ops.renoise import Renoised


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration and the process and time that have its alpha and sigma."""

    process: EDM | VP | RectifiedFlow
    time: float
    gaussians: Gaussians


def standard_case(**changes) -> Case:
    """The configuration of the published numbers: EDM at sigma = 0.5."""
    return Case(EDM(), 0.5, dataclasses.replace(Gaussians(), **changes))


def some_cases() -> list[Case]:
    """A random configuration of each process."""
    return [Case(*case) for case in random_cases()]


class Gaussian(nn.Module):
    """Denoiser of N(mean, scale^2), whose mean a condition shifts, with features."""

    feature_shapes = ((2,),)

    def __init__(self, case: Case, mean: float, scale: float) -> None:
        super().__init__()
        self.process = case.process
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        self.calls += 1
        alpha, sigma = (value.view(-1, 1) for value in self.process.alpha_sigma(t.double()))
        mean = self.mean if condition is None else self.mean + condition.view(-1, 1)
        variance = self.scale**2
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return mean + gain * (x - alpha * mean)

    def features(self, x: Tensor, t: Tensor, condition: Tensor | None) -> list[Tensor]:
        return [torch.cat((x * self.scale, x**2), dim=1)]

    def forward_with_features(
        self, x: Tensor, t: Tensor, condition: Tensor | None, output_graph: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        with torch.set_grad_enabled(output_graph and torch.is_grad_enabled()):
            return self(x, t, condition), self.features(x, t, condition)


class Shift(nn.Module):
    """Generator mean + scale * z; its input is z."""

    def __init__(self, mean: float, scale: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return self.mean + self.scale * x


class Nodes:
    """The quadrature's nodes in the place of a `Noise`."""

    def uniform(self, stream: str, index: Tensor) -> Tensor:
        return torch.full(index.shape, 0.5, dtype=torch.float64)

    def key(self, stream: str) -> None:
        return None


def make(kind: type[Objective], case: Case, settings, teacher_mean: float = 0.0, **parts):
    """An objective with teacher N(teacher_mean, v), and student and critic N(mean, scale^2)."""
    g = case.gaussians
    process, law = case.process, FixedList((case.time,))
    objective = kind(
        Denoiser(Shift(g.mean, g.scale), process, X0()),
        Denoiser(Gaussian(case, teacher_mean, g.teacher_variance**0.5), process, X0()),
        Denoiser(parts.pop("critic", None) or Gaussian(case, g.mean, g.scale), process, X0()),
        (case.time,),
        law,
        law,
        settings=settings,
        **parts,
    )
    return objective


def student_gradient(
    objective: Objective, case: Case, order: int = 60, **fields: Any
) -> tuple[float, float]:
    """Gradient of the student's expected loss to (mean, scale).

    Args:
        objective: from `make`.
        case: its configuration.
        order: nodes of the quadrature, of z and of eps.
        fields: of the batch; functions of the nodes z are called.
    """
    update = student_update(objective, case, order, **fields)
    parameters = list(objective.student.parameters())
    tensors, cotangents = zip(*update.pairs, strict=True)
    return tuple(float(g) for g in torch.autograd.grad(tensors, parameters, cotangents))


def student_update(objective: Objective, case: Case, order: int = 60, **fields: Any) -> Update:
    """The student's update on the nodes, with its cotangents weighted by their weights."""
    z, eps, weights = case.gaussians.nodes(order)
    batch = Batch(torch.arange(len(z)), Nodes(), 1.0, (1,))
    fields = {name: value(z) if callable(value) else value for name, value in fields.items()}
    batch = dataclasses.replace(batch, **fields)
    for name in objective.frozen_roles():
        objective.critic_modules()[name].requires_grad_(False)

    def renoise_at_nodes(x0, alpha, sigma, *args):
        x_t = alpha[:, None] * x0 + sigma[:, None] * eps[:, None]
        return Renoised(x_t, x_t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "renoise", renoise_at_nodes)
        sample = objective.student.network(z[:, None], None, batch.condition)
        update = objective.student_update(batch, sample)
    pairs = [(tensor, cotangent * weights[:, None]) for tensor, cotangent in update.pairs]
    return dataclasses.replace(update, pairs=pairs)
