"""`density_ratio_weight` beside FastGen's chain, at one batch of SDXL and one of CIFAR-10.

Everything is [B]-sized: launches and host syncs are the cost, bytes are nothing. Without history
and prior the two definitions of a bin's mean agree, so those are the settings here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import OURS, Case, Results, Variant, near
from bench.inputs import TOLERANCE, draw, in_float64
from bench.peers import calls, reference_peers
from fastdistill.ops import density_ratio_weight
from fastdistill.ops.density_ratio import _density_ratio_weight

BINS, HEADS = 10, 4
POWER, C1, EXPONENT = 1.0, 1.0, -1.0  # r / (1 + r), the Jensen-Shannon divergence


class Inputs(NamedTuple):
    """One set: the discriminator's logits, the samples' bins and the bins' history."""

    logits: Tensor
    bins: Tensor
    history: Tensor


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    return (_case(batch, device) for batch in ((8,) if small else (2048, 48)))


def _case(batch: int, device: torch.device) -> Case:
    reference = _density_ratio_weight.reference

    def make(generator: torch.Generator) -> Inputs:
        logits = draw((batch, HEADS), torch.float32, generator)
        bins = torch.randint(BINS, (batch,), generator=generator, device=device)
        return Inputs(logits, bins, torch.zeros(BINS, 2, device=device))

    def ours(logits: Tensor, bins: Tensor, history: Tensor) -> Results:
        return density_ratio_weight(
            *(logits, bins, history),
            power=POWER,
            c1=C1,
            exponent=EXPONENT,
            decay=0.0,
            prior=0.0,
        )

    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        return (*inputs, POWER, 1.0, C1, EXPONENT, 0.0, 0.0, 10.0, 0.1, 20.0)

    return Case(
        *("density_ratio_weight", f"{batch}x{HEADS}", torch.float32),
        bytes_moved=4 * batch * (HEADS + 4) + 16 * BINS,
        make=make,
        variants={
            OURS: calls(ours, tuple, keep=2),
            "eager, as FastGen": Variant(calls(fastgen, tuple).bind, waits=True),
            **reference_peers(reference, arguments, device.type == "cuda", keep=2),
        },
        judge=lambda inputs: near(
            reference(*in_float64(arguments(inputs)))[:2], TOLERANCE[torch.float32]
        ),
    )


def fastgen(logits: Tensor, index: Tensor, history: Tensor, ema: float = 0.0) -> Results:
    """f-distill's weight for the Jensen-Shannon divergence, its bins without an average over time.

    Those bins are selected by a mask, for which the host waits.
    """
    ratio = logits.float().mean(dim=1).clamp(-10, 10).exp().clamp(0.1, 20)
    count = torch.bincount(index, minlength=BINS)
    total = torch.bincount(index, weights=ratio, minlength=BINS)
    mean = (total / (count + 1e-6)).to(history.dtype)
    bins, seen = history[:, 0].clone(), count > 0
    bins[seen] = ema * bins[seen] + (1 - ema) * mean[seen]
    ratio = ratio / (bins[index] + 1e-6)
    h = 1 - 1 / (1 + ratio)
    return h / (h.mean() + 1e-6), ratio
