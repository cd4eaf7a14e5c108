"""`compile_blocks`: `torch.compile` on the repeated blocks of a network, not on the whole of it.

A block is compiled once for all its copies of one shape, in seconds; a whole SDXL takes minutes.
What is compiled is a block's ``forward`` alone: hooks, as FSDP2's, stay outside, so that it may
come before or after ``fully_shard``, and arenas may move the weights. `fastdistill.accelerate`
comes before, since it changes what a block's forward is.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

REPEATED_BLOCKS = {
    "UNet2DConditionModel": ("BasicTransformerBlock", "ResnetBlock2D"),
    "UNet2DModel": ("ResnetBlock2D",),
    "DiTTransformer2DModel": ("BasicTransformerBlock",),
    "PixArtTransformer2DModel": ("BasicTransformerBlock",),
    "SD3Transformer2DModel": ("JointTransformerBlock",),
}
"""Classes of the blocks of diffusers' models that name none, or not all, in _repeated_blocks."""

LEAST_RECOMPILES = 64
"""Variants of a block's code: its widths, times batch sizes, times with and without a graph."""


def compile_blocks(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the forward of every repeated block in place; state-dict keys stay.

    torch's limit of recompilations is raised to `LEAST_RECOMPILES`; beyond it torch raises, as it
    does where a block cannot be compiled as one graph. A copy of the network is compiled too.

    Args:
        network: a diffusers model, an adapter with one, or any module with a ``_repeated_blocks``:
            names of the classes of its blocks.
        backend: torch.compile's.

    Returns:
        How many blocks the network has.

    Raises:
        ValueError: for a network that names no blocks, or has none of those that it names.
    """
    network = getattr(network, "base", network)  # a critic on another network's weights
    names = repeated_block_classes(network)
    blocks = [module for module in network.modules() if _is_one_of(module, names)]
    if not blocks:
        raise ValueError(
            f"{type(network).__name__} has no repeated blocks to compile"
            + (f" (looked for {', '.join(sorted(names))})" if names else "")
            + "; name their classes in a class attribute _repeated_blocks, or set compile: none"
        )
    limit: Any = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, LEAST_RECOMPILES)
    compiled: dict[Any, Any] = {}
    for block in blocks:
        forward: Any = block.forward
        function = getattr(forward, "__func__", None)
        if function is None or forward.__self__ is not block:
            raise ValueError(
                f"the forward of a {type(block).__name__} was replaced by {forward!r}; expected a "
                "method of the block"
            )
        if hasattr(function, "_torchdynamo_orig_callable"):
            continue  # compiled before
        if function not in compiled:
            compiled[function] = torch.compile(
                function, fullgraph=True, dynamic=False, backend=backend
            )
        block.forward = types.MethodType(compiled[function], block)
    return len(blocks)


def repeated_block_classes(network: nn.Module) -> set[str]:
    """Names of the classes of a network's repeated blocks."""
    names: set[str] = set()
    for module in network.modules():
        names.update(getattr(module, "_repeated_blocks", None) or ())
        for kind in type(module).__mro__:
            names.update(REPEATED_BLOCKS.get(kind.__name__, ()))
    return names


def _is_one_of(module: nn.Module, names: set[str]) -> bool:
    # FSDP2 gives a module a class of its own, below the first one.
    return any(kind.__name__ in names for kind in type(module).__mro__)
