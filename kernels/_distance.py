"""The distances of whole samples, as `ops/_distance.py` defines them.

Which of them is a constant of a kernel, so that none of the usual ones needs a power; an exponent
without a name and the offset are numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl


def kind(exponent: float, elementwise: bool) -> str:
    """Name of the distance, for a kernel's ``KIND``."""
    if elementwise:
        return "l1"
    return {1.0: "norm", 2.0: "square"}.get(exponent, "power")


@triton.jit
def sign(x):
    """1, -1 or 0; 0 for NaN, as torch has it."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def slope(square, exponent, KIND: tl.constexpr):
    """G = p S^(p/2 - 1) of S = ||y||^2 + offset^2, with d'(y) = G y; 0 at S = 0 but for p = 2."""
    safe = tl.where(square == 0, 1.0, square)
    if KIND == "square":
        slope = 2.0 + 0.0 * safe
    elif KIND == "norm":
        slope = tl.where(square == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(safe)))
    else:
        slope = exponent * tl.exp2((0.5 * exponent - 1.0) * tl.log2(safe))
        slope = tl.where(square == 0, 0.0, slope)
    return slope
