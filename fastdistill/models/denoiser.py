"""`Denoiser`: a network with the process and the parametrisation that give its output a meaning."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdistill.diffusion import Parametrisation, Process
from fastdistill.ops import Coefficients

Condition = Any
"""What a sample is conditioned on: None, a tensor [B, ...] or a (nested) dict or tuple of them."""


class Network(Protocol):
    """What a `Denoiser` asks of its network; an ``nn.Module`` whose calls return raw outputs."""

    def __call__(
        self, model_input: Tensor, noise_condition: Tensor, condition: Condition
    ) -> Tensor:
        """Raw output F, of the shape of ``model_input``."""

    def features(
        self, model_input: Tensor, noise_condition: Tensor, condition: Condition
    ) -> list[Tensor]:
        """Features for a discriminator, stopping at the last of them."""

    def forward_with_features(
        self,
        model_input: Tensor,
        noise_condition: Tensor,
        condition: Condition,
        output_graph: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Raw output and features from a single pass; the output has a graph if asked for."""


class Level(NamedTuple):
    """Everything that depends on the noise level of each sample; tensors are [B]."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    coefficients: Coefficients
    input_scale: Tensor | None
    noise_condition: Tensor


class Denoiser(nn.Module):
    """D(x_t, t) = a x_t + b F(c_in x_t, t): one of the roles teacher, student or critic.

    Args:
        network: computes the raw output F.
        process: forward process that the network was trained on.
        parametrisation: what F is.
        input_dtype: dtype that the network reads; that of x_t if None.

    Attributes:
        start: makes a student's first input at (alpha, sigma) of standard normal noise, as a
            `fastdistill.gaussian.Gaussian` does; pure noise of the process' scale if None.
    """

    start: Any

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        parametrisation: Parametrisation,
        input_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.process = process
        self.parametrisation = parametrisation
        self.input_dtype = input_dtype
        self.start = None

    def level(self, t: Tensor) -> Level:
        """Coefficients at times t [B]."""
        alpha, sigma = self.process.alpha_sigma(t)
        return Level(
            t,
            alpha,
            sigma,
            self.parametrisation.coefficients(alpha, sigma),
            self.parametrisation.input_scale(alpha, sigma),
            self.parametrisation.noise_condition(t, alpha, sigma),
        )

    def first_input(self, noise: Tensor, t: Tensor) -> Tensor:
        """What a student reads first, of standard normal noise [B, ...], at time t [B]."""
        if self.start is not None:
            return self.start(noise, *self.process.alpha_sigma(t))
        scale = self.process.start_scale(t).to(noise.dtype)
        return scale.reshape(-1, *[1] * (noise.ndim - 1)) * noise

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """Denoised sample D(x_t, t) in the dtype of x_t  # [B, ...]"""
        level = self.level(t)
        shape = (-1, *[1] * (x_t.ndim - 1))
        model_input = x_t if level.input_scale is None else level.input_scale.reshape(shape) * x_t
        raw = self.network(
            model_input.to(self.input_dtype or x_t.dtype), level.noise_condition, condition
        )
        a, b = (number.reshape(shape).to(x_t.dtype) for number in level.coefficients)
        return a * x_t + b * raw


def concatenate_conditions(first: Condition, second: Condition) -> Condition:
    """Two conditions of one structure as one of twice the batch; None stays None.

    Raises:
        ValueError: where their structures differ.
    """
    leaves, spec = pytree.tree_flatten(first)
    others, other_spec = pytree.tree_flatten(second)
    if spec != other_spec:
        raise ValueError(
            f"condition and uncondition differ in structure: {spec} and {other_spec}; guidance "
            "needs an unconditional version of every part of the condition"
        )
    joined = [
        None if leaf is None else torch.cat((leaf, other))
        for leaf, other in zip(leaves, others, strict=True)
    ]
    return pytree.tree_unflatten(joined, spec)
