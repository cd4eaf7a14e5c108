"""Cases of the ops that transformer blocks are made of, for `certificate.py`.

Tokens are [BATCH, T, C] of DiT-XL/2 and PixArt (C = 1152), SD3 (1536), Flux (3072) and SDXL's
blocks (640 and 1280); heads [BATCH, T, H, D] of SD3.5 (D = 64), DiT (72) and Flux (128).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

TOKENS = {
    "DiT-XL": (1024, 1152),
    "SD3-blocks": (4096, 1536),
    "Flux-blocks": (4608, 3072),
    "SDXL-640": (4096, 640),
    "SDXL-1280": (1024, 1280),
}
HEADS = {"64-a-head": (4096, 24, 64), "72-a-head": (1024, 16, 72), "128-a-head": (4608, 24, 128)}
NORMS = ("norm_modulated", "norm_gated", "norm_frozen", "norm_affine", "gated_residual")
ROPES = ("rms_norm", "rms_norm_rope")
OPS = (*NORMS, *ROPES)
TEXT = 333  # tokens of the second stream
# What one program reads once beside its rows: channels that all tokens of a sample share.
CHANNELS = ("gate_ptr", "factor_ptr", "offset_ptr")
# Rows that a program reads in one turn of its loop, or at all.
ROWS = ("x_ptr", "residual_ptr", "h_ptr", "grad_y_ptr", "grad_sum_ptr", "grad_ptr")


def shapes(op: str) -> dict[str, tuple[int, ...]]:
    """Tokens or heads of an op's cases, by name."""
    return TOKENS if op in NORMS else HEADS


def names() -> Iterator[tuple[str, str]]:
    """Every op with the names of its shapes."""
    for op in OPS:
        yield from ((op, shape) for shape in shapes(op))


def launch(
    op: str, shape: str, batch: int, dtype: torch.dtype, meta: Callable[..., torch.Tensor]
) -> None:
    """Call the launchers of ``op``, forward and backward, on meta tensors."""
    from fastdistill.kernels import gated_residual, modulated_norm, rms_norm_rope

    if op in ROPES:
        tokens, heads, channels = HEADS[shape]
        x, second = (meta(batch, t, heads, channels, dtype=dtype) for t in (tokens, TEXT))
        weights = [meta(channels, dtype=dtype) for _ in range(2)]
        angles = [meta(tokens + TEXT, channels) if op == "rms_norm_rope" else None for _ in "cs"]
        given = (x, weights[0], second, weights[1], *angles, 1e-6)
        rms_norm_rope.rms_norm_rope(*given)
        grad = meta(batch, tokens + TEXT, heads, channels, dtype=dtype)
        rms_norm_rope.rms_norm_rope_backward(grad, *given)
        return
    tokens, channels = TOKENS[shape]

    def rows() -> torch.Tensor:
        return meta(batch, tokens, channels, dtype=dtype)

    def channel() -> torch.Tensor:
        return meta(batch, 6 * channels, dtype=dtype)[:, :channels]

    if op == "gated_residual":
        gated_residual.gated_residual(rows(), rows(), channel())
        gated_residual.gated_residual_backward(rows(), channel(), rows())
        return
    factor, offset = channel(), channel()
    if op == "norm_affine":
        factor, offset = (meta(channels, dtype=dtype) for _ in range(2))
    gated = op in ("norm_gated", "norm_frozen")
    residual = rows() if op != "norm_modulated" else None
    gate = channel() if gated else None
    x, kept = rows(), residual if op == "norm_gated" else None
    plus_one, sums = op != "norm_affine", op != "norm_frozen"
    _, _, mean, rstd = modulated_norm.modulated_norm(
        x, residual, gate, factor, offset, plus_one, 1e-6
    )
    grad_sum = None if residual is None else rows()
    modulated_norm.modulated_norm_backward(
        *(x, kept, gate, factor, mean, rstd, grad_sum, rows(), plus_one, sums)
    )


def tile(bound: dict[str, Any]) -> int:
    """Bytes of the rows that a program of these kernels reads at once."""
    read = [bound[name] for name in ROWS if bound.get(name) is not None]
    length = bound["N"] if "N" in bound else bound["ROWS"] * bound["CHANNELS"]
    return sum(value.element_size() * length for value in read)


def is_one(bound: dict[str, Any]) -> bool:
    """Whether these are the arguments of a kernel on tokens or heads with a loop or a tile."""
    return not {"grad_y_ptr", "dgate_ptr", "joint"}.isdisjoint(bound)


def size(shape: str) -> int:
    """Elements of a sample."""
    return math.prod((TOKENS | HEADS)[shape])
