"""What one op of a graph is: its class, its operations, the bytes that its kernel must move.

Known from the op's name and schema alone, so that ops of extensions are counted too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class Op:
    """What is known of an op from its name and schema."""

    def __init__(self, function: Any) -> None:
        name = function.__name__.partition(".")[0]
        schema = function._schema
        aliases = [value.alias_info for value in (*schema.arguments, *schema.returns)]
        self.written = [
            index
            for index, value in enumerate(schema.arguments)
            if value.alias_info is not None and value.alias_info.is_write
        ]
        self.is_view = name in _VIEWS or (
            bool(schema.returns)
            and not self.written
            and all(value is not None for value in aliases[len(schema.arguments) :])
        )
        self.launches = not self.is_view and not name.startswith(_ALLOCATIONS)
        self.reads_rows = name in ("embedding", "index", "gather", "index_select")
        self.overwrites = name in ("copy_", "fill_", "zero_", "normal_", "uniform_")
        self.reads_twice = name in _READ_TWICE
        plain = name.rstrip("_").removesuffix("_backward")
        self.family = _FAMILIES.get(plain, plain)
        self.formula = flop_registry.get(function.overloadpacket)
        self.kind = None if self.formula is None else _kind(name)

    def touched(
        self, args: tuple, kwargs: Mapping[str, Any], outputs: Sequence[Tensor]
    ) -> list[int]:
        """Bytes of every tensor that the kernel must read or write, each once.

        Torch's norms read their inputs twice: for statistics, and for gradients of their weights.
        """
        inputs = {
            id(value): value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)
        }
        written = [args[index] for index in self.written if index < len(args)]
        fresh = [value for value in outputs if id(value) not in inputs]
        read = list(inputs.values())
        if self.reads_rows:
            read = fresh
        elif self.overwrites:
            read = [value for value in read if value is not written[0]]
        elif self.reads_twice and len(fresh) > 1:
            read = 2 * read
        return [_bytes(value) for value in (*read, *fresh, *written) if isinstance(value, Tensor)]


def _kind(name: str) -> str:
    if "attention" in name:
        return "attention"
    return "convolution" if "conv" in name else "linear"


_VIEWS = {"_unsafe_view", "lift_fresh"}
_ALLOCATIONS = ("empty", "new_empty", "record_stream", "set_", "resize_")
_READ_TWICE = {"native_group_norm", "native_group_norm_backward", "native_layer_norm_backward"}
_FAMILIES = {
    "native_layer_norm": "LayerNorm",
    "native_group_norm": "GroupNorm",
    "_fused_rms_norm": "RMSNorm",
    "gelu": "GELU",
    "silu": "SiLU",
    "_to_copy": "cast",
    "clone": "copy",
    "copy": "copy",
    "sum": "reduce",
    "mean": "reduce",
    "sub": "add",
    "rsub": "add",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
}


@contextlib.contextmanager
def like_on_devices() -> Iterator[None]:
    """Keep on the meta device the kernels that GPUs have for attention and RMS norm.

    Names are replaced, not intercepted by a TorchFunctionMode, which is off during backward passes,
    where checkpointed blocks run again.
    """
    replaced = {"scaled_dot_product_attention": _attention, "rms_norm": _rms_norm}
    originals = {name: getattr(F, name) for name in replaced}

    def choose(original: Any, stand_in: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            on_meta = next(iter((*args, *kwargs.values()))).is_meta
            return (stand_in if on_meta else original)(*args, **kwargs)

        return call

    for name, stand_in in replaced.items():
        setattr(F, name, choose(originals[name], stand_in))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention; with a mask or in float32, which it does not take, the efficient kernel."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(repeats, -3) for part in (key, value))
    if attn_mask is None and query.itemsize == 2:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    """A layer norm: it reads, writes and saves the same, but for one number a row."""
    return F.layer_norm(input, list(normalized_shape), weight, None, eps or 1e-6)


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements in memory; a broadcast one's only once."""
    count = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else min(length, 1)
    return count
