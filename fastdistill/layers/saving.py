"""Values that are made again in the backward pass instead of being saved for it.

A linear layer saves its input for the gradient of its weight. Where the input is an activation or
a norm of tensors that are saved anyway, that is as much memory again for what one cheap pass makes
from them. `cheap` marks such a value with the function that made it; `layers_of` runs layers on a
marked value and lets them save the mark in its place. Any layers: a LoRA's and hooked ones too.

The function's inputs are saved by a node of autograd's, as any op saves its own, so that activation
checkpointing and offloading around a block treat them like the rest. Under ``torch.compile``
nothing is marked: its partitioner decides by itself what to make again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_MARK = "_fastdistill_made_by"


def cheap(value: Tensor, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``value``, marked as ``function(*inputs)``.

    Args:
        value: the function's result; the mark is the tensor object's own, not that of its views.
        function: deterministic and cheap; run without gradients in the backward pass.
        inputs: what is saved in the value's place.
    """
    if value.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        setattr(value, _MARK, _Made(value, function, inputs))
    return value


def layers_of(value: Tensor, *layers: nn.Module) -> list[Tensor]:
    """``[layer(value) for layer in layers]``, saving a marked value's inputs in its place."""
    made = None if torch.compiler.is_compiling() else getattr(value, _MARK, None)
    if made is None or not torch.is_grad_enabled():
        return [layer(value) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(made.pack, _unpack):
        return [layer(value) for layer in layers]


class _Made:
    """How a value was made, and the value itself between the first and the last use of it."""

    def __init__(
        self, value: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]
    ) -> None:
        self._storage = value.untyped_storage()._cdata
        self._function = function
        self._inputs: Any = _Inputs.apply(*inputs).grad_fn
        self._saved = self._asked = 0
        self._value: Tensor | None = None

    def pack(self, saved: Tensor) -> Tensor | _Place:
        if saved.untyped_storage()._cdata != self._storage:
            return saved
        self._saved += 1
        return _Place(self, saved)

    def again(self) -> Tensor:
        """The value; forgotten once it was asked for as often as it was saved, by a whole pass."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self._value = self._function(*self._inputs.saved_tensors)
        self._asked += 1
        if self._asked == self._saved:
            self._asked, self._value = 0, None
        return value


class _Place:
    """A saved view of a value that is made again."""

    def __init__(self, made: _Made, saved: Tensor) -> None:
        self._made = made
        self._form = saved.shape, saved.stride(), saved.storage_offset()

    def unpack(self) -> Tensor:
        return self._made.again().as_strided(*self._form)


def _unpack(packed: Tensor | _Place) -> Tensor:
    return packed.unpack() if isinstance(packed, _Place) else packed


class _Inputs(torch.autograd.Function):
    """A node that saves tensors and is never run backward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise AssertionError("this node only saves its inputs")
