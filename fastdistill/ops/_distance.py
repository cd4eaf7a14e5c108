"""`Distance`: the distances of whole samples that projection and consistency losses measure."""

from __future__ import annotations

from typing import NamedTuple


class Distance(NamedTuple):
    """d(y) of a sample's whole vector y, and its gradient, in one family.

        S = ||y||^2 + offset^2
        d = S^(exponent / 2) - offset^exponent        d'(y) = exponent S^(exponent / 2 - 1) y

    or, elementwise, d = sum |y_j| with d'(y) = sign(y). The gradient at y = 0 is 0 where it is not
    unique. Norms are of the whole sample, never of single elements: `offset` belongs to that
    convention (arXiv 2310.14189 takes 0.00054 sqrt(N)).
    """

    exponent: float
    offset: float = 0.0
    elementwise: bool = False

    @staticmethod
    def squared_l2() -> Distance:
        """||y||^2."""
        return Distance(2.0)

    @staticmethod
    def pseudo_huber(c: float) -> Distance:
        """sqrt(||y||^2 + c^2) - c; c = 0 is the norm itself (arXiv 2310.14189, 2410.16794)."""
        if not c >= 0:
            raise ValueError(f"c is {c}; expected a number that is not negative")
        return Distance(1.0, float(c))

    @staticmethod
    def power(a: float) -> Distance:
        """||y||^a with a >= 1."""
        if not a >= 1:
            raise ValueError(f"a is {a}; expected at least 1, below which ||y||^a is no distance")
        return Distance(float(a))

    @staticmethod
    def l1() -> Distance:
        """Sum of |y_j|."""
        return Distance(1.0, elementwise=True)


def check_distance(distance: Distance) -> None:
    """Raise ValueError for a distance that the kernels do not compute."""
    exponent, offset, elementwise = distance
    if elementwise and (exponent, offset) == (1.0, 0.0):
        return
    if not elementwise and exponent >= 1 and (offset == 0 or (offset > 0 and exponent == 1)):
        return
    raise ValueError(
        f"{distance} is not one of Distance.squared_l2(), .pseudo_huber(c), .power(a), .l1()"
    )
