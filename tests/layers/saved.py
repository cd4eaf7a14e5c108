"""How many bytes autograd keeps of a call, each storage counted once, without the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """torch's flash attention, which keeps its inputs, its output and one number a row.

    With a mask, its memory-efficient attention, which keeps the mask too.
    """
    if attn_mask is None:
        rest = (0.0, False, False)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, *rest)[0]
    mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, True)[0]


def saved_bytes(model: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes of the different storages that the graph of ``call()`` holds beside parameters."""
    known = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # the tensors too, so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with patch.object(F, "scaled_dot_product_attention", flash), hooks:
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
