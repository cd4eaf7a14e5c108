"""`sum_of_squares`: the squared norm of a flat range in one pass, left on the device.

    s = sum_j x_j^2

Sums are float32 (float64 for float64), in an order that depends on the length alone, so that a run
repeats bit by bit. Not finite where any element is not: `adamw_ema_` takes it as its finite check.

Bytes moved: x once. Launches on a GPU: one, where the caller keeps the ticket.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops._arguments import check_floating
from fastdistill.ops._op import Op


def _reference(value: Tensor, ticket: Tensor | None = None) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)).square().sum()


def _fake(value: Tensor, ticket: Tensor | None = None) -> Tensor:
    return value.new_empty((), dtype=torch.promote_types(value.dtype, torch.float32))


_sum_of_squares = Op(
    "sum_of_squares",
    "(Tensor value, Tensor(a!)? ticket=None) -> Tensor",
    _reference,
    _fake,
    kernel="norm",
    summed=True,
)


def _check_ticket(value: Tensor, ticket: Tensor) -> None:
    if hasattr(value, "to_local"):
        raise ValueError("value is a DTensor, which takes no ticket: pass value.to_local()")
    form = ticket.dtype, ticket.shape, ticket.device
    if form != (torch.int32, (1,), value.device):
        raise ValueError(
            f"ticket is {ticket.dtype} of shape {tuple(ticket.shape)} on {ticket.device}; expected "
            f"torch.zeros(1, dtype=torch.int32) on {value.device}"
        )


def sum_of_squares(value: Tensor, *, ticket: Tensor | None = None) -> Tensor:
    """Sum of the squares of all elements, a float32 scalar on the device (float64 for float64).

    Of a DTensor's shards it is the partial sum that torch's collectives complete.

    Args:
        value: a tensor of any shape, float32, bfloat16 or float16 (float64 off the GPU).
        ticket: int32 [1] on the device, zero, and left zero: the programs of a GPU count in it who
            comes last. Keep one for calls that follow each other; without it each call makes its
            own, a second launch. Not for a DTensor. Other backends leave it alone.

    Raises:
        ValueError: for another dtype, or a ticket of another form.
    """
    check_floating("value", value)
    if ticket is not None:
        _check_ticket(value, ticket)
    with torch.no_grad():
        return _sum_of_squares(value.contiguous(), ticket)
