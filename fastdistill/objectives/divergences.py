"""The f-divergences D_f(p || q) = E_q[f(p / q)] between teacher p and student q.

A pathwise gradient weights the score gap of a sample by h(r) = r^2 f''(r), r = p / q (f-distill,
arXiv 2502.15681, table 1; the further rows are derived from f). Every row of the table is
h = constant * r^p (c0 + c1 r)^q, which is all that `density_ratio_weight` needs; the constant
cancels where weights are normalised to mean 1.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Divergence:
    """One f-divergence: its generator f, normalised to f(1) = 0, and its weight h."""

    name: str
    f: Callable[[Tensor], Tensor]
    """Generator f(r)."""
    power: float
    """p of h = constant * r^p (c0 + c1 r)^q."""
    c0: float = 1.0
    c1: float = 0.0
    exponent: float = 0.0
    """q of h."""
    constant: float = 1.0

    @property
    def needs_ratio(self) -> bool:
        """Whether h depends on r, so that a discriminator is needed."""
        return self.power != 0.0 or self.exponent != 0.0

    def h(self, ratio: Tensor) -> Tensor:
        """Weight h(r) = r^2 f''(r) of density ratios r = p / q, elementwise."""
        return (
            self.constant * ratio.pow(self.power) * (self.c0 + self.c1 * ratio).pow(self.exponent)
        )


def _alpha(a: float) -> Divergence:
    """The alpha-family; a = 0 is reverse KL, 1 forward KL, 1/2 four times squared Hellinger."""
    return Divergence(f"alpha:{a:g}", lambda r: (r**a - a * r - (1 - a)) / (a * (a - 1)), power=a)


def _skew_jensen_shannon(pi: float) -> Divergence:
    def f(r: Tensor) -> Tensor:
        mixture = pi * r + 1 - pi
        return pi * r * r.log() - mixture * mixture.log()

    return Divergence(f"skew_jensen_shannon:{pi:g}", f, 1, 1 - pi, pi, -1, pi * (1 - pi))


def _skew_reverse_kl(pi: float) -> Divergence:
    """KL(q || pi p + (1 - pi) q): reverse KL whose weight falls where the teacher has no mass."""
    return Divergence(
        f"skew_reverse_kl:{pi:g}", lambda r: -(pi * r + 1 - pi).log(), 2, 1 - pi, pi, -2, pi**2
    )


_TABLE = {
    divergence.name: divergence
    for divergence in (
        Divergence("reverse_kl", lambda r: -r.log(), 0),
        Divergence(
            "softened_reverse_kl", lambda r: (r + 1) * torch.log(0.5 + 0.5 / r), 0, 1, 1, -1
        ),
        Divergence(
            "jensen_shannon",
            lambda r: r * r.log() - (r + 1) * torch.log((r + 1) / 2),
            1,
            1,
            1,
            -1,
        ),
        Divergence("squared_hellinger", lambda r: 1 - r.sqrt(), 0.5, constant=0.25),
        Divergence("forward_kl", lambda r: r * r.log(), 1),
        Divergence("jeffreys", lambda r: (r - 1) * r.log(), 0, 1, 1, 1),
        Divergence("pearson", lambda r: (r - 1) ** 2, 2, constant=2),
        Divergence("neyman", lambda r: (1 - r) ** 2 / r, -1, constant=2),
        Divergence("le_cam", lambda r: (1 - r) ** 2 / (1 + r), 2, 1, 1, -3, 8),
    )
}

_FAMILIES = {
    "alpha": _alpha,
    "skew_jensen_shannon": _skew_jensen_shannon,
    "skew_reverse_kl": _skew_reverse_kl,
}


def divergence_names() -> list[str]:
    """Names that `get_divergence` knows; families take a number, as ``alpha:0.7``."""
    return [*_TABLE, *(f"{family}:NUMBER" for family in _FAMILIES)]


def get_divergence(name: str) -> Divergence:
    """The divergence of this name.

    Args:
        name: one of `divergence_names`; the families are written ``alpha:-1`` and
            ``skew_jensen_shannon:0.3``.

    Raises:
        ValueError: for an unknown name, for a family's number that has no finite f, and for total
            variation, whose pathwise gradient is zero almost everywhere.
    """
    if name in _TABLE:
        return _TABLE[name]
    if name == "total_variation":
        raise ValueError(
            "total_variation has f'' = 0 almost everywhere, so the pathwise gradient vanishes; "
            "use squared_hellinger or jensen_shannon"
        )
    family, separator, number = name.partition(":")
    if separator and family in _FAMILIES:
        value = float(number)
        if family == "alpha" and value in (0.0, 1.0):
            raise ValueError(f"{name} is reverse_kl (0) or forward_kl (1): use that name")
        if family.startswith("skew") and not 0 < value < 1:
            raise ValueError(f"{name}: the mixture weight must lie between 0 and 1")
        return _FAMILIES[family](value)
    near = difflib.get_close_matches(name, [*_TABLE, *_FAMILIES], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"divergence {name!r} is unknown{hint} Known: {', '.join(divergence_names())}")
