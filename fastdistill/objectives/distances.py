"""Distances of whole samples by name, as recipes write them."""

from __future__ import annotations

import math

from fastdistill.choices import nearest
from fastdistill.ops import Distance

PSEUDO_HUBER = 0.00054
"""c / sqrt(N) of pseudo-Huber where no c is given (arXiv 2310.14189)."""
_KINDS = ("squared_l2", "l1", "pseudo_huber", "pseudo_huber:C", "power:A")


def get_distance(name: str, elements: int = 1) -> Distance:
    """The distance of this name.

    Args:
        name: squared_l2, l1, ``power:A`` for ||y||^A, ``pseudo_huber:C`` for sqrt(||y||^2 + C^2),
            or ``pseudo_huber`` with C = 0.00054 sqrt(elements).
        elements: elements of one sample.

    Raises:
        ValueError: for an unknown name, and for a number that makes no distance.
    """
    kind, _, number = name.partition(":")
    try:
        match kind, float(number) if number else None:
            case "squared_l2", None:
                return Distance.squared_l2()
            case "l1", None:
                return Distance.l1()
            case "pseudo_huber", c:
                return Distance.pseudo_huber(PSEUDO_HUBER * math.sqrt(elements) if c is None else c)
            case "power", a if a is not None:
                return Distance.power(a)
    except ValueError as error:
        raise ValueError(f"distance {name!r}: {error}") from error
    raise ValueError(f"distance {name!r} is unknown{nearest(name, _KINDS)}")
