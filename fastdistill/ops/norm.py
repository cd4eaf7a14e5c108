"""`sum_of_squares`: the squared norm of a flat range in one pass, left on the device.

    s = sum_j x_j^2

Sums are float32 (float64 for float64), in an order that depends on the length alone, so that a run
repeats bit by bit. Not finite where any element is not: `adamw_ema_` takes it as its finite check.

Bytes moved: x once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops._arguments import check_floating
from fastdistill.ops._op import Op


def _reference(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)).square().sum()


def _fake(value: Tensor) -> Tensor:
    return value.new_empty((), dtype=torch.promote_types(value.dtype, torch.float32))


_sum_of_squares = Op(
    "sum_of_squares", "(Tensor value) -> Tensor", _reference, _fake, kernel="norm", summed=True
)


def sum_of_squares(value: Tensor) -> Tensor:
    """Sum of the squares of all elements, a float32 scalar on the device (float64 for float64).

    Of a DTensor's shards it is the partial sum that torch's collectives complete.

    Args:
        value: a tensor of any shape, float32, bfloat16 or float16 (float64 off the GPU).

    Raises:
        ValueError: for another dtype.
    """
    check_floating("value", value)
    with torch.no_grad():
        return _sum_of_squares(value.contiguous())
