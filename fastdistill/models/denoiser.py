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
        """Raw output F, of the shape of ``model_input``.

        ``noise_condition`` is [B], or [B, 2] for a network with ``two_times``: see `Denoiser`.
        """

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

    A network whose ``two_times`` is true is also told how far to lead the sample, as MeanFlow's is:
    its noise condition is [B, 2], of t and of the way s_t - s_r in flow time s = sigma /
    (alpha + sigma), in [0, 1]. Unless told otherwise it leads all the way, to s_r = 0.

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

    @property
    def two_times(self) -> bool:
        """Whether the network is told a second time."""
        return getattr(self.network, "two_times", False)

    def add_second_time(self) -> None:
        """Let the network take a second time, without changing any of its answers yet.

        Raises:
            ValueError: for a network that has no place for one.
        """
        if self.two_times:
            return
        if not hasattr(self.network, "add_second_time"):
            raise ValueError(
                f"{type(self.network).__name__} has no second time, which mean_flow tells its "
                "student; choose another method, or give the network an add_second_time()"
            )
        self.network.add_second_time()

    @property
    def loss_space(self) -> Parametrisation:
        """Where a squared error of its network has unit weight, where nothing else is asked for."""
        return self.parametrisation

    def level(self, t: Tensor, until: Tensor | None = None) -> Level:
        """Coefficients at times t [B], and what the network is told.

        Args:
            t: times [B] in the process' clock.
            until: flow time s_r [B] to which a network with two times leads; 0 if None.
        """
        alpha, sigma = self.process.alpha_sigma(t)
        noise_condition = self.parametrisation.noise_condition(t, alpha, sigma)
        if self.two_times:
            way = sigma / (alpha + sigma) - (0 if until is None else until)
            noise_condition = torch.stack((noise_condition, way), dim=1)
        return Level(
            t,
            alpha,
            sigma,
            self.parametrisation.coefficients(alpha, sigma),
            self.parametrisation.input_scale(alpha, sigma),
            noise_condition,
        )

    def first_input(self, noise: Tensor, t: Tensor) -> Tensor:
        """What a student reads first, of standard normal noise [B, ...], at time t [B]."""
        if self.start is not None:
            return self.start(noise, *self.process.alpha_sigma(t))
        scale = self.process.start_scale(t).to(noise.dtype)
        return scale.reshape(-1, *[1] * (noise.ndim - 1)) * noise

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition = None,
        until: Tensor | None = None,
    ) -> Tensor:
        """Denoised sample D(x_t, t) in the dtype of x_t  # [B, ...]

        ``until`` is that of `level`.
        """
        level = self.level(t, until)
        shape = (-1, *[1] * (x_t.ndim - 1))
        model_input = x_t if level.input_scale is None else level.input_scale.reshape(shape) * x_t
        raw = self.network(
            model_input.to(self.input_dtype or x_t.dtype), level.noise_condition, condition
        )
        a, b = (number.reshape(shape).to(x_t.dtype) for number in level.coefficients)
        return a * x_t + b * raw

    def guided(
        self, x_t: Tensor, t: Tensor, condition: Condition, uncondition: Condition, scale: float
    ) -> Tensor:
        """D without the condition, and ``scale`` times the way from there to D with it."""
        if scale == 1:
            return self(x_t, t, condition)
        both = concatenate_conditions(condition, uncondition)
        conditional, unconditional = self(torch.cat((x_t, x_t)), torch.cat((t, t)), both).chunk(2)
        return unconditional + scale * (conditional - unconditional)


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
