"""`DigitsNetwork`: a residual MLP for vectors and small images, small enough for two cores."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdistill.models.denoiser import Condition

OMEGA = 10
"""Numbers that tell what an augmentation drew (`fastdistill.objectives.augmentation`)."""


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.modulation = nn.Linear(embedding, width)
        self.outer = nn.Linear(width, width)
        with torch.no_grad():
            self.outer.weight.mul_(0.3)
            self.outer.bias.zero_()

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        inner = self.inner(self.norm(hidden)) + self.modulation(embedding)
        return hidden + self.outer(F.silu(inner))


class DigitsNetwork(nn.Module):
    """Residual MLP over flattened samples, told their noise level and, where there is one, class.

    Args:
        shape: shape of one sample: an image's, or (d,) of vectors.
        classes: number of classes; 0 makes it unconditional. Label ``classes`` is the null class.
        width: width of the hidden layers.
        blocks: number of residual blocks.
        embedding: width of the embedding of noise level and class.
        omega: whether it can be told what an augmentation drew.
        octaves: the input's sines and cosines at 1, 2, 4, ... that are read beside it. Without any,
            a network of few inputs is too smooth for narrow modes (arXiv 2006.10739).
    """

    _repeated_blocks = ("_Block",)

    def __init__(
        self,
        shape: tuple[int, ...] = (1, 8, 8),
        classes: int = 10,
        width: int = 256,
        blocks: int = 3,
        embedding: int = 64,
        omega: bool = False,
        octaves: int = 0,
    ) -> None:
        super().__init__()
        pixels, frequencies = math.prod(shape), 16
        self.two_times = False
        self.shape, self.width = shape, width
        self.recompute = False
        scale = torch.linspace(math.log(0.5), math.log(16.0), frequencies).exp()
        self.frequencies: Tensor
        self.register_buffer("frequencies", scale, persistent=False)
        self.classes = nn.Embedding(classes + 1, embedding) if classes else None
        self.level = nn.Sequential(nn.Linear(2 * frequencies, embedding), nn.SiLU())
        self.mix = nn.Linear(embedding, embedding)
        self.octaves = octaves
        self.enter = nn.Linear(pixels * (1 + 2 * octaves), width)
        self.blocks = nn.ModuleList(_Block(width, embedding) for _ in range(blocks))
        output = nn.Linear(width, pixels)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        self.leave = nn.Sequential(nn.LayerNorm(width), output)
        self.omega = nn.Linear(OMEGA, embedding, bias=False) if omega else None
        if self.omega is not None:
            nn.init.zeros_(self.omega.weight)

    @property
    def takes_omega(self) -> bool:
        """Whether it can be told what an augmentation drew."""
        return self.omega is not None

    def add_second_time(self) -> None:
        """Let noise conditions be [B, 2]; the second changes nothing before it is trained."""
        second = nn.Linear(2 * len(self.frequencies), self.mix.in_features)
        nn.init.zeros_(second.weight)
        nn.init.zeros_(second.bias)
        self.second = second.to(self.mix.weight)
        self.two_times = True

    def silence(self) -> None:
        """Let the output be zero, as a fresh network's is; what is inside stays."""
        output = self.leave[1]
        assert isinstance(output, nn.Linear)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.recompute = True

    @property
    def feature_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what `features` returns, for one sample."""
        return [(self.width,)] * len(self.blocks)

    def forward(
        self,
        model_input: Tensor,
        noise_condition: Tensor,
        condition: Condition,
        omega: Tensor | None = None,
    ) -> Tensor:
        """Raw output of the shape of ``model_input`` [B, *shape].

        Args:
            model_input: scaled noisy images.
            noise_condition: what tells the noise level  # [B]
            condition: labels, int64 [B].
            omega: what an augmentation drew [B, OMEGA]; None is as zeros, a plain sample.
        """
        return self._finish(self._hidden(model_input, noise_condition, condition, omega)[-1])

    def features(
        self, model_input: Tensor, noise_condition: Tensor, condition: Condition
    ) -> list[Tensor]:
        """Hidden state after each block  # [[B, width], ...]"""
        return self._hidden(model_input, noise_condition, condition)

    def forward_with_features(
        self,
        model_input: Tensor,
        noise_condition: Tensor,
        condition: Condition,
        output_graph: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Raw output, with a graph if asked for, and the features, from one pass."""
        hidden = self._hidden(model_input, noise_condition, condition)
        with torch.set_grad_enabled(output_graph and torch.is_grad_enabled()):
            return self._finish(hidden[-1]), hidden

    def _hidden(
        self,
        model_input: Tensor,
        noise_condition: Tensor,
        condition: Condition,
        omega: Tensor | None = None,
    ) -> list[Tensor]:
        first = noise_condition[:, 0] if self.two_times else noise_condition
        embedding = self.level(self._waves(first).to(model_input.dtype))
        if self.two_times:
            second = self._waves(noise_condition[:, 1]).to(model_input.dtype)
            embedding = embedding + self.second(second)
        if self.classes is not None:
            embedding = embedding + self.classes(condition)
        if omega is not None:
            assert self.omega is not None
            embedding = embedding + self.omega(omega.to(embedding.dtype))
        embedding = F.silu(self.mix(embedding))
        hidden = self.enter(self._inputs(model_input.flatten(1)))
        states = []
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, embedding, use_reentrant=False)
            else:
                hidden = block(hidden, embedding)
            states.append(hidden)
        return states

    def _inputs(self, flat: Tensor) -> Tensor:
        """Inputs [B, pixels] with their sines and cosines  # [B, pixels * (1 + 2 octaves)]"""
        phases = [2.0**octave * flat for octave in range(self.octaves)]
        waves = [wave for phase in phases for wave in (phase.sin(), phase.cos())]
        return torch.cat((flat, *waves), dim=1) if waves else flat

    def _waves(self, level: Tensor) -> Tensor:
        phase = level[:, None] * self.frequencies
        return torch.cat((phase.cos(), phase.sin()), dim=1)

    def _finish(self, hidden: Tensor) -> Tensor:
        raw = self.leave(hidden).unflatten(1, self.shape)
        return raw.clone()  # FSDP2 warns of outputs that are views
