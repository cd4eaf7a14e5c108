"""`Labels`: class labels without samples, for methods that look at none."""

from __future__ import annotations

import torch

from fastdistill.data.base import RealBatch
from fastdistill.diffusion import Noise


class Labels:
    """Labels drawn alike from all classes, as a function of (seed, step) and the sample's place.

    Args:
        shape: shape of one of the network's samples.
        classes: number of classes, which is the null class.
        device: where the labels are made, and returned.

    Raises:
        ValueError: for less than one class.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, device: torch.device | str = "cpu"
    ) -> None:
        if classes < 1:
            raise ValueError(f"labels of {classes} classes were asked for; expected at least one")
        self.shape, self.classes, self.device = shape, classes, torch.device(device)
        self._noise: dict[int, Noise] = {}

    def batch(self, seed: int, step: int, count: int, share: slice = slice(None)) -> RealBatch:
        if seed not in self._noise:
            self._noise[seed] = Noise(seed, self.device)
        index = torch.arange(count, device=self.device)[share]
        draws = self._noise[seed].at(step).uniform("labels", index)
        labels = (draws * self.classes).long().clamp(max=self.classes - 1)
        return RealBatch(None, labels, torch.full_like(labels, self.classes))
