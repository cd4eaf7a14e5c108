"""`EMA`: an exponential moving average of a network's weights that moves when the network moves."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class EMA(Generic[Module]):
    """Moving average of a module's parameters; its buffers are copied.

    Args:
        module: the module to follow.
        half_life: updates after which an old weight counts half.
    """

    def __init__(self, module: Module, half_life: float) -> None:
        if half_life <= 0:
            raise ValueError(f"half_life is {half_life}; expected a positive number of updates")
        self.module: Module = copy.deepcopy(module)
        self.module.requires_grad_(False).eval()
        self.half_life = half_life
        self._average: list[Tensor] = list(self.module.parameters())
        self._followed: list[Tensor] = list(module.parameters())

    @torch.no_grad()
    def update(self, updates: int, moved: Tensor) -> None:
        """Move by one update of the followed module.

        Args:
            updates: number of updates done before this one; early averages forget faster, at
                (1 + n) / (10 + n), so that the start leaves no trace.
            moved: 1 where the update was made and 0 where it was skipped, a scalar on the device.
        """
        decay = min(0.5 ** (1 / self.half_life), (1 + updates) / (10 + updates))
        step = torch._foreach_sub(self._followed, self._average)
        torch._foreach_mul_(step, moved * (1 - decay))
        torch._foreach_add_(self._average, step)
