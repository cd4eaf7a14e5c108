"""`geglu`: the gated linear unit with GELU, on the two halves of a projection where they lie.

    h = a gelu(g),     a and g the first and the second half of x along its last dimension

    gelu(g) = g Phi(g),                                          approximate "none"
    gelu(g) = g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3))       approximate "tanh"

Shapes: x [..., 2 D], h [..., D] (arXiv 2002.05202). Nothing is chunked and nothing is
concatenated: the gradient's halves are written into one tensor. Bytes moved: forward x and h once;
backward x, the gradient of h and that of x once, and h where it is wanted again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops._op import Op

APPROXIMATIONS = ("none", "tanh")


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves in the dtype that is computed in  # [..., D] each"""
    a, g = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return a, g


def _reference(x: Tensor, approximate: str) -> Tensor:
    a, g = _halves(x)
    return (a * F.gelu(g, approximate=approximate)).to(x.dtype)


def _fake(x: Tensor, approximate: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _backward_reference(
    grad: Tensor, x: Tensor, approximate: str, value: bool
) -> tuple[Tensor, Tensor]:
    a, g = _halves(x)
    wide = grad.to(a.dtype)
    gate = F.gelu(g, approximate=approximate)
    grad_x = torch.empty_like(x)
    grad_a, grad_g = grad_x.chunk(2, dim=-1)
    torch.mul(wide, gate, out=grad_a)
    grad_g.copy_(torch.ops.aten.gelu_backward(wide * a, g, approximate=approximate))
    return grad_x, (a * gate).to(x.dtype) if value else x.new_empty(x.shape[0], 0)


def _backward_fake(grad: Tensor, x: Tensor, approximate: str, value: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(grad) if value else x.new_empty(x.shape[0], 0)


_geglu = Op(
    "geglu",
    "(Tensor x, str approximate) -> Tensor",
    _reference,
    _fake,
    kernel="glu",
    native_cpu=False,
)
_geglu_backward = Op(
    "geglu_backward",
    "(Tensor grad, Tensor x, str approximate, bool value) -> (Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
    kernel="glu",
    batch_outputs=2,
    native_cpu=False,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.approximate = inputs[1]


def _backward(ctx: Any, grad: Tensor):
    (x,) = ctx.saved_tensors
    return _geglu_backward(grad.contiguous(), x, ctx.approximate, False)[0], None


_geglu.register_autograd(_backward, _setup_context)


def geglu(x: Tensor, approximate: str = "none") -> Tensor:
    """h = a gelu(g) of the halves a and g of ``x``, computed in float32; keeps x for its backward.

    Args:
        x: [..., 2 D], float32, bfloat16 or float16 (float64 off the GPU).
        approximate: "none" for the exact GELU, or "tanh", as in torch.

    Returns:
        [..., D] in the dtype of x.

    Raises:
        ValueError: for a last dimension that has no halves, and an unknown approximation.
    """
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"x is {tuple(x.shape)}; expected [..., 2 D] with a batch in front")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate is {approximate!r}; expected one of {APPROXIMATIONS}")
    return _geglu(x.contiguous(), approximate)


def geglu_backward(
    grad: Tensor, x: Tensor, approximate: str = "none", value: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradient of `geglu` and, in the same pass, its value again, for who did not keep it.

    Args:
        grad: gradient of h  # [..., D]
        x: as `geglu` got it  # [..., 2 D]
        approximate: as `geglu` got it.
        value: whether h is wanted.

    Returns:
        Gradient of x [..., 2 D], and h [..., D] or, where it is not wanted, nothing in an empty
        tensor.
    """
    return _geglu_backward(grad.contiguous(), x.contiguous(), approximate, value)
