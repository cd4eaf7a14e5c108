"""The certificate's cases of U-Nets' layers: GEGLU and group norm at the sizes of SD 1.5 and SDXL.

A program of these kernels has a tile of two dimensions, whose bytes are known; beside them it reads
numbers of channels and writes sums of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SHAPES = {
    "geglu": ("4096x1280", "4096x2560", "1024x5120"),  # tokens x width of a half
    "group_norm": ("320x128x128", "640x64x64", "1280x32x32", "2560x32x32"),
    "group_norm_last": ("320x128x128", "640x64x64", "1280x32x32", "2560x32x32"),
}
GROUPS = 32
# Tensors of which a program loads, and stores, a tile; twice where it takes both halves.
LOADS = {
    "_geglu_kernel": ("x_ptr", "x_ptr"),
    "_geglu_backward_kernel": ("grad_ptr", "x_ptr", "x_ptr"),
    "_moments_kernel": ("x_ptr",),
    "_apply_kernel": ("x_ptr",),
    "_gradient_sums_kernel": ("grad_ptr", "x_ptr"),
    "_gradient_kernel": ("grad_ptr", "x_ptr"),
}
STORES = {
    "_geglu_kernel": ("out_ptr",),
    "_geglu_backward_kernel": ("grad_x_ptr", "grad_x_ptr", "again_ptr"),
    "_moments_kernel": (),
    "_apply_kernel": ("out_ptr",),
    "_gradient_sums_kernel": (),
    "_gradient_kernel": ("grad_x_ptr", "again_ptr"),
}
# Numbers of channels: of those that lie side by side a thread may read 128 bits.
SIDE_BY_SIDE = ("shift_ptr", "weight_ptr", "bias_ptr")
NUMBERS = 12  # and mean, rstd and two means of the gradient, for up to four channels or groups
NARROW = {
    "_statistics_kernel": "sums of the C / G channels of a group, a 64th of what was read or less",
    "_reduce_kernel": "sums of the C / G channels of a group, a 64th of what was read or less",
}


def launch(op: str, shape: str, batch: int, dtype: torch.dtype, meta: Callable[..., Any]) -> None:
    """Call forward and backward launchers of ``op`` on meta tensors."""
    from fastdistill.kernels import glu, group_norm

    sizes = [int(size) for size in shape.split("x")]

    def tensor(*size: int) -> torch.Tensor:
        value = meta(*size, dtype=dtype)
        last = op == "group_norm_last" and value.ndim == 4
        return value.to(memory_format=torch.channels_last) if last else value

    if op == "geglu":
        x, grad = tensor(batch, sizes[0], 2 * sizes[1]), tensor(batch, *sizes)
        glu.geglu(x, "none")
        for approximate, value in (("none", True), ("tanh", False)):
            glu.geglu_backward(grad, x, approximate, value)
        return
    x, grad, shift = tensor(batch, *sizes), tensor(batch, *sizes), tensor(batch, sizes[0])
    weight, bias = tensor(sizes[0]), tensor(sizes[0])
    mean, rstd = meta(batch, GROUPS), meta(batch, GROUPS)
    group_norm.group_norm_silu(x, shift, weight, bias, GROUPS, 1e-5, True)
    for value in (True, False):
        rest = (shift if value else None, weight, bias, mean, rstd, GROUPS, True, value)
        group_norm.group_norm_silu_backward(grad, x, *rest)


def expected(kernel: str, bound: dict[str, Any], threads: int) -> dict[str, Any]:
    """Bytes that one program must load and store: a tile of each tensor, once."""
    if kernel.startswith("_geglu"):
        elements, steps, several, last = bound["ROWS"] * bound["COLUMNS"], 1, False, False
    else:
        elements, steps = bound["CHANNELS"] * bound["PLACES"], bound.get("STEPS", 1)
        several, last = bound["CHANNELS"] > 1, bound["LAST"]

    def size(names: tuple[str, ...]) -> int:
        found = [bound[name] for name in names if bound[name] is not None]
        return sum(elements * steps * value.element_size() for value in found)

    loads, stores = size(LOADS[kernel]), size(STORES[kernel])
    beside = sum(bound.get(name) is not None for name in SIDE_BY_SIDE) if several else 0
    numbers = 0 if kernel.startswith("_geglu") else NUMBERS
    return {
        "loads": {16: loads},
        "stores": {16: stores},
        "least": {"loads": loads, "stores": stores},
        "shares": 16 * threads * beside,
        "numbers": {"loads": numbers * (4 if last else 1), "stores": numbers},
    }
