"""Norms and gates in front of linear layers and convolutions, which keep what *they* read alone.

A linear layer keeps its input for the gradient of its weight. Where that input is a norm or a gate
of something that is kept anyway, it is a second copy of what is known: here the function and the
layers behind it are one step of autograd, which keeps the function's inputs. The backward pass
makes the value again where the function's gradient reads its inputs in any case. No matrix product
is computed twice.

    value = f(inputs),   y_i = layer_i(value)

    grad value   = sum_i layer_i^T(grad y_i)
    value, grads = f.backward(grad value)          one pass over the inputs
    grad weight_i from grad y_i and value
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.layers.accelerate import is_changed
from fastdistill.layers.saving import cheap, layers_of
from fastdistill.ops.glu import _geglu, _geglu_backward
from fastdistill.ops.group_norm import (
    _group_norm_silu,
    _group_norm_silu_backward,
    laid_out_as,
)

Inputs = Sequence[Any]
"""Tensors that a source reads, with None for those that are absent."""


class Source(Protocol):
    """A function whose value is cheap to make again; its options are constants."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The value, and small numbers that the backward pass wants kept."""

    def backward(
        self, grad: Tensor, inputs: Inputs, numbers: Inputs, value: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The value again, where it is wanted, and a gradient for each input."""


class Gate(NamedTuple):
    """GEGLU of a projection's output; inputs: (x,)."""

    approximate: str = "none"

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return (_geglu(*inputs, self.approximate),)

    def backward(
        self, grad: Tensor, inputs: Inputs, numbers: Inputs, value: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        grad_x, again = _geglu_backward(grad.contiguous(), *inputs, self.approximate, value)
        return again, (grad_x,)


class LayerNorm(NamedTuple):
    """torch's layer norm over the last dimension; inputs: (x, weight, bias)."""

    eps: float

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        x, weight, bias = inputs
        return (F.layer_norm(x, x.shape[-1:], weight, bias, self.eps),)

    def backward(
        self, grad: Tensor, inputs: Inputs, numbers: Inputs, value: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        x, weight, bias = inputs
        shape = list(x.shape[-1:])
        again, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, self.eps)
        wanted = [True, weight is not None, bias is not None]
        grads = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, weight, bias, wanted
        )
        return again, grads


class GroupNorm(NamedTuple):
    """Group norm, SiLU behind it where asked for; inputs: (x, shift added to x, weight, bias)."""

    groups: int
    eps: float
    silu: bool = False
    tokens: bool = False
    """Whether the value is [B, T, C] for x [B, C, ...] with T places"""

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        value, *numbers = _group_norm_silu(*inputs, self.groups, self.eps, self.silu)
        return self._out(value), *numbers

    def backward(
        self, grad: Tensor, inputs: Inputs, numbers: Inputs, value: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        x, shift = inputs[:2]
        grad = grad.transpose(1, 2).view(x.shape) if self.tokens else grad
        given = (laid_out_as(grad, x), *inputs, *numbers, self.groups, self.silu, value)
        dx, dshift, dweight, dbias, again = _group_norm_silu_backward(*given)
        grads = (dx, None if shift is None else dshift, dweight, dbias)
        return self._out(again) if value else again, grads

    def _out(self, value: Tensor) -> Tensor:
        return value.flatten(2).transpose(1, 2).contiguous() if self.tokens else value


class _Linears(torch.autograd.Function):
    """Linear layers behind one source: arguments are its inputs, the weights, the biases."""

    @staticmethod
    def forward(ctx: Any, source: Any, layers: int, *tensors: Any) -> tuple[Tensor, ...]:
        inputs = tensors[: -2 * layers]
        weights, biases = tensors[-2 * layers : -layers], tensors[-layers:]
        value, *numbers = source.forward(inputs)
        ctx.save_for_backward(*inputs, *weights, *numbers)
        ctx.source, ctx.layers, ctx.inputs = source, layers, len(inputs)
        return tuple(F.linear(value, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        saved, layers, end = ctx.saved_tensors, ctx.layers, ctx.inputs + ctx.layers
        inputs, weights, numbers = saved[: ctx.inputs], saved[ctx.inputs : end], saved[end:]
        needed = ctx.needs_input_grad[2 + ctx.inputs :]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_value = flat[0] @ weights[0]
        for grad, weight in zip(flat[1:], weights[1:], strict=True):
            grad_value = torch.addmm(grad_value, grad, weight)
        shape = (*grads[0].shape[:-1], grad_value.shape[-1])
        wanted = any(needed[:layers])
        value, input_grads = ctx.source.backward(grad_value.view(shape), inputs, numbers, wanted)
        weight_grads: list[Tensor | None] = [None] * layers
        if wanted:
            rows = value.view(-1, value.shape[-1])
            weight_grads = [g.T @ rows if n else None for g, n in zip(flat, needed, strict=False)]
        bias_grads = [g.sum(0) if n else None for g, n in zip(flat, needed[layers:], strict=True)]
        return None, None, *input_grads, *weight_grads, *bias_grads


class _Convolution(torch.autograd.Function):
    """A convolution behind a source: arguments are its inputs, the weight, the bias."""

    @staticmethod
    def forward(ctx: Any, source: Any, options: tuple, *tensors: Any) -> Tensor:
        *inputs, weight, bias = tensors
        value, *numbers = source.forward(inputs)
        ctx.save_for_backward(*inputs, weight, *numbers)
        ctx.source, ctx.options, ctx.inputs = source, options, len(inputs)
        return F.conv2d(value, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        saved = ctx.saved_tensors
        inputs, weight, numbers = saved[: ctx.inputs], saved[ctx.inputs], saved[ctx.inputs + 1 :]
        stride, padding, dilation, groups = ctx.options

        def gradients(value: Tensor, mask: list[bool]):
            sizes = [weight.shape[0]] if mask[2] else None
            rest = (stride, padding, dilation, False, [0, 0], groups, mask)
            return torch.ops.aten.convolution_backward(grad, value, weight, sizes, *rest)

        # The gradient of a convolution's input depends on the input's shape and layout alone.
        grad_value = gradients(inputs[0], [True, False, False])[0]
        wanted = ctx.needs_input_grad[-2:]
        value, input_grads = ctx.source.backward(grad_value, inputs, numbers, any(wanted))
        if not any(wanted):
            return None, None, *input_grads, None, None
        return None, None, *input_grads, *gradients(value, [False, *wanted])[1:]


def linears_behind(source: Source, inputs: Inputs, layers: Sequence[Any]) -> list[Tensor]:
    """Outputs of ``layers`` for the value of ``source``, which is not kept where all are plain.

    Layers that are not plain (a LoRA's, hooked) are called on the value, and keep the inputs of
    ``source`` in its place: it is made again in a pass of its own. In autocast they keep their
    copy of it.
    """
    if _fuses(inputs[0], layers, nn.Linear):
        weights, biases = [m.weight for m in layers], [m.bias for m in layers]
        return list(_Linears.apply(source, len(layers), *inputs, *weights, *biases))
    return layers_of(_made_again(source, inputs), *layers)


def convolution_behind(source: Source, inputs: Inputs, layer: Any) -> Tensor:
    """Output of a convolution for the value of ``source``, kept or not as in `linears_behind`."""
    if _fuses(inputs[0], [layer], nn.Conv2d) and layer.padding_mode == "zeros":
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        if not isinstance(layer.padding, str):
            return _Convolution.apply(source, options, *inputs, layer.weight, layer.bias)
    return layers_of(_made_again(source, inputs), layer)[0]


def value_of(source: Source, inputs: Inputs) -> Tensor:
    """The value of ``source``, differentiable and kept by whoever needs it."""
    return source.forward(inputs)[0]


def _made_again(source: Source, inputs: Inputs) -> Tensor:
    """The value of ``source``, whose inputs layers save in its place."""
    return cheap(value_of(source, inputs), lambda *inputs: source.forward(inputs)[0], *inputs)


def _fuses(x: Tensor, layers: Sequence[Any], kind: type[nn.Module]) -> bool:
    """Whether ``layers`` are what their class says and no more, outside of autocast."""
    plain = all(type(layer) is kind and not is_changed(layer) for layer in layers)
    return plain and (x.is_meta or not torch.is_autocast_enabled(x.device.type))


def is_idle(dropout: Any) -> bool:
    """Whether a dropout passes its input on."""
    return (dropout.p == 0 or not dropout.training) and not is_changed(dropout)
