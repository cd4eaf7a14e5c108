"""Which of torch's attention kernels is tried first: cuDNN's, then flash, then memory-efficient.

torch tries flash attention first; on Hopper cuDNN's is reported to be the faster one for shapes of
training. A kernel that cannot take a call (flash has no masks, as those of PixArt's text) leaves it
to the next one, and the last takes everything. On CPUs there is one fused kernel and nothing to
choose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill.layers.accelerate import Patch, replace_attribute

ORDER: tuple[Any, ...] = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_MARK = "_fastdistill_cudnn_first"


def priority_of(attn: Any, q: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context for the attention kernel of ``attn``: `ORDER` where it was asked for, on GPUs."""
    if not q.is_cuda or _MARK not in vars(attn):
        return contextlib.nullcontext()
    return in_order()


def in_order() -> contextlib.AbstractContextManager[object]:
    """Context in which torch tries attention kernels in `ORDER`."""
    if torch.compiler.is_compiling() or not hasattr(torch._C, "_set_sdp_priority_order"):
        return sdpa_kernel(list(ORDER), set_priority=True)
    return _cheaply_in_order()


@contextlib.contextmanager
def _cheaply_in_order() -> Iterator[None]:
    """What `sdpa_kernel` does to the order alone: 30 microseconds less for each attention."""
    before = torch._C._get_sdp_priority_order()
    mine = [int(backend) for backend in ORDER]
    torch._C._set_sdp_priority_order([*mine, *(rest for rest in before if rest not in mine)])
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(before)


def _asks(module: nn.Module) -> bool:
    """Whether an attention runs a processor of ours, which asks `priority_of`, and has no mark."""
    if not isinstance(module, (Attention, FluxAttention)) or _MARK in vars(module):
        return False
    return type(module.processor).__module__.startswith("fastdistill.layers.")


PATCHES = (
    Patch(
        "attention_priority",
        "attention of patched blocks: on GPUs cuDNN's kernel is tried before flash attention",
        _asks,
        lambda module: replace_attribute(module, _MARK, True),
    ),
)
