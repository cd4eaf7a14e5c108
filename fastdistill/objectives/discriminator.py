"""A discriminator on a denoiser's features, and the cotangents of its logistic losses.

Trained to tell noised real samples from noised student samples at the same noise level, its logit
estimates log p_t / q_t (arXiv 2502.15681), and its gradient through the features is the GAN term
of DMD2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Discriminator(nn.Module):
    """One head a feature: logits [B, heads] from features [B, C] or [B, C, H, W].

    Feature maps pass 4x4 convolutions of stride two with group norm until they are at most four
    pixels wide (DMD2's head), then an average; vectors pass two layers.

    Args:
        feature_shapes: shape of each feature of one sample: (C,) or (C, H, W).
        width: width of the vector heads.
    """

    def __init__(self, feature_shapes: Sequence[Sequence[int]], width: int = 128) -> None:
        super().__init__()
        if not feature_shapes:
            raise ValueError("feature_shapes is empty; expected the shape of at least one feature")
        self.heads = nn.ModuleList(_head(tuple(shape), width) for shape in feature_shapes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits of "real" [B, heads], float32."""
        logits = [head(value.float()) for head, value in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)


def _head(shape: tuple[int, ...], width: int) -> nn.Module:
    if len(shape) == 1:
        return nn.Sequential(
            nn.LayerNorm(shape[0]), nn.Linear(shape[0], width), nn.SiLU(), nn.Linear(width, 1)
        )
    if len(shape) != 3:
        raise ValueError(f"a feature has shape {shape}; expected (C,) or (C, H, W)")
    channels, height, size = shape[0], shape[1], max(shape[1:])
    layers: list[nn.Module] = []
    while size > 4 and height >= 2:
        layers += [
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
            nn.GroupNorm(min(32, channels), channels),
            nn.SiLU(),
        ]
        size, height = size // 2, height // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class LogisticCotangent(NamedTuple):
    """A logistic loss of logits and its gradient."""

    cotangent: Tensor
    """Gradient of scale * sum over samples of the head-mean losses  # [B, heads]"""
    loss: Tensor
    """Mean over the heads of each sample  # [B]"""


def logistic_cotangent(logits: Tensor, real: bool, scale: float) -> LogisticCotangent:
    """softplus(-logit) for logits that should say real, softplus(logit) for the others.

    Args:
        logits: discriminator logits [B, heads].
        real: the answer wanted: True on real samples, and on fakes in the student's update.
        scale: factor of the cotangent, as weight / B.
    """
    sign = -1.0 if real else 1.0
    signed = sign * logits.detach()
    cotangent = (sign * scale / logits.shape[1]) * torch.sigmoid(signed)
    return LogisticCotangent(cotangent, F.softplus(signed).mean(dim=1))
