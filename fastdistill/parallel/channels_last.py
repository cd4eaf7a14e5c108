"""Convolutions whose weights FSDP2 can shard though they are channels-last in memory.

FSDP2 refuses parameters that are not contiguous. A channels-last weight [O, I, H, W] is contiguous
memory seen as [O, H, W, I], so that is what the module holds and FSDP2 gathers; the convolution
gets the permuted view, and state dicts keep the usual shape.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def hold_channels_last_weights(module: nn.Module) -> None:
    """Let every convolution with a channels-last weight hold it as FSDP2 wants it, in place."""
    for part in module.modules():
        if isinstance(part, _CONVOLUTIONS) and not part.weight.is_contiguous():
            _hold(part)


def is_held_channels_last(module: nn.Module) -> bool:
    """Whether a module's weight is [O, H, W, I] for what its state dict calls [O, I, H, W]."""
    return "_conv_forward" in module.__dict__


def to_usual(weight: Tensor) -> Tensor:
    """[O, H, W, I], or with one more spatial dimension, as a view [O, I, H, W]."""
    return weight.movedim(-1, 1)


def _hold(module: nn.Conv2d | nn.Conv3d) -> None:
    weight = module.weight
    held = weight.detach().movedim(1, -1)
    module.weight = nn.Parameter(held.contiguous(), requires_grad=weight.requires_grad)
    module._conv_forward = functools.partial(_forward, module._conv_forward)  # type: ignore
    module.register_state_dict_post_hook(_show_usual)
    module.register_load_state_dict_pre_hook(_take_usual)


def _forward(convolve: Any, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return convolve(value, to_usual(weight), bias)


def _show_usual(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}weight"] = to_usual(state[f"{prefix}weight"])


def _take_usual(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    name = f"{prefix}weight"
    if name in state:
        state[name] = state[name].movedim(1, -1).contiguous(memory_format=torch.contiguous_format)
