"""What every op is compared with: its own reference, eager and compiled, and chains by autograd.

Rivals do the mathematics that public engines do, in the order and the dtypes in which they do it,
and nothing else: what an engine logs or checks for itself is left out. Conversions that an engine
makes once, outside the step, are made before the clock starts. Liger has none of these ops; apex's
fused Adam is in the optimizer's table where apex is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Results, Run, Variant

Arguments = Callable[[Any], tuple[Any, ...]]

REFERENCE = "reference, eager"
COMPILED = "torch.compile"
AUTOTUNED = "torch.compile, max-autotune"


def wide(value: Tensor, like: Tensor) -> Tensor:
    """One number a sample [B], to broadcast against [B, ...]."""
    return value.view(-1, *[1] * (like.ndim - 1))


def calls(function: Callable[..., Any], arguments: Arguments, keep: int | None = None) -> Variant:
    """A variant that calls ``function`` with the arguments that a set of inputs gives.

    ``keep`` says how many of its results are compared, where only some of them have peers.
    """

    def bind(inputs: Any) -> Run:
        values = arguments(inputs)
        return lambda: function(*values)[:keep]

    return Variant(bind)


def reference_peers(
    reference: Callable[..., Results],
    arguments: Arguments,
    autotune: bool,
    keep: int | None = None,
    eager: bool = True,
) -> dict[str, Variant]:
    """The op's own reference, run eagerly and compiled, so that no chain can have been padded."""
    versions = {REFERENCE: reference} if eager else {}
    versions[COMPILED] = compiled(reference)
    if autotune:
        versions[AUTOTUNED] = compiled(reference, "max-autotune-no-cudagraphs")
    return {name: calls(function, arguments, keep) for name, function in versions.items()}


def by_autograd(
    loss: Callable[..., Tensor],
    leaves: Callable[[Any], tuple[Tensor, ...]],
    rest: Arguments,
) -> Variant:
    """A variant that forms ``loss(*leaves, *rest)`` and differentiates it in its leaves."""

    def bind(inputs: Any) -> Run:
        live = [value.detach().requires_grad_() for value in leaves(inputs)]
        data = rest(inputs)
        return lambda: torch.autograd.grad(loss(*live, *data), live)

    return Variant(bind)


def split_like_a_network(value: Tensor, pieces: int = 60) -> tuple[Tensor, ...]:
    """Views of a flat tensor in as many pieces as a network has, of very different sizes."""
    shares = torch.linspace(0.1, 1, pieces).pow(3).cumsum(0).double()
    ends = (shares / shares[-1] * value.numel()).round().long().tolist()
    starts = [0, *ends[:-1]]
    return tuple(value[start:end] for start, end in zip(starts, ends, strict=True) if end > start)


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """The function compiled for one shape, without graph breaks; losses with their backward."""
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def standard_normal(found: Tensor) -> str | None:
    """What is wrong with numbers that should be standard normal: moments 6 standard errors off."""
    values, count = found.double(), found.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        mean = float(values.pow(power).mean())
        # The last term is for what storage in bfloat16 adds.
        if not abs(mean - moment) <= 6 * (variance / count) ** 0.5 + 1e-3:
            return f"moment {power} of the noise is {mean:.4f}; expected {moment}"
    return None


def forward_and_backward(
    function: Callable[..., Tensor], leaves: Callable[[Any], tuple[Tensor, ...]]
) -> Variant:
    """A variant that runs a layer and differentiates it; the last tensor of a set is the gradient.

    Its results are the layer's and those of `torch.autograd.grad`, in the order of ``leaves``.
    """

    def bind(inputs: Any) -> Run:
        live = [value.detach().requires_grad_() for value in leaves(inputs)]

        def run() -> Results:
            value = function(*live)
            return value.detach(), *torch.autograd.grad(value, live, inputs[-1])

        return run

    return Variant(bind)
