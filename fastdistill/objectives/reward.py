"""`Reward`: what samples are wanted to be like, and its gradient to them.

Diff-Instruct++ (arXiv 2410.18881) and Diff-Instruct* (arXiv 2410.20898) add

    - reward_weight * mean over samples of reward(x0, condition)

to a divergence of student and teacher. The reward's own graph ends at the samples: its gradient is
taken on a detached copy of them and sent on as a cotangent, as every other term's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdistill.models import Condition
from fastdistill.models.latents import LatentDecoder


class Reward(Protocol):
    """A differentiable score of clean samples, each sample's its own."""

    def __call__(self, sample: Tensor, condition: Condition) -> Tensor:
        """Rewards, the higher the better, of samples [B, ...] and what they were made for  # [B]"""


class RewardCotangent(NamedTuple):
    """Result of `reward_cotangent`."""

    cotangent: Tensor
    """Gradient of -scale * sum of the rewards to the samples, in their dtype  # [B, ...]"""
    reward: Tensor
    """Reward of each sample  # [B]"""


def reward_cotangent(
    reward: Reward, sample: Tensor, condition: Condition, scale: float
) -> RewardCotangent:
    """What the loss -scale * sum of the rewards sends into the samples.

    Args:
        reward: of which the gradient is taken; its own parameters should be frozen.
        sample: clean samples [B, ...].
        condition: what they were made for.
        scale: reward_weight / B for a mean over the batch.

    Raises:
        ValueError: for a reward that gives anything but one number a sample, or has no gradient.
    """
    leaf = sample.detach().requires_grad_()
    with torch.enable_grad():
        value = reward(leaf, condition)
    if value.shape != (len(sample),) or not value.requires_grad:
        raise ValueError(
            f"the reward {type(reward).__name__} gave shape {tuple(value.shape)} "
            f"{'with' if value.requires_grad else 'without'} a gradient for {len(sample)} samples; "
            f"expected a differentiable ({len(sample)},)"
        )
    (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, -scale))
    return RewardCotangent(gradient, value.detach())


class LinearReward:
    """slope * mean of the sample's elements: brightness, where samples are images."""

    def __init__(self, slope: float = 1.0) -> None:
        self.slope = slope

    def __call__(self, sample: Tensor, condition: Condition) -> Tensor:
        return self.slope * sample.flatten(1).mean(1)


class QuadraticReward:
    """-1/2 mean of (x - target)^2: highest where every element is ``target``."""

    def __init__(self, target: float = 0.0) -> None:
        self.target = target

    def __call__(self, sample: Tensor, condition: Condition) -> Tensor:
        return -(sample - self.target).square().flatten(1).mean(1) / 2


class ClassifierReward:
    """log p(class | image) under a classifier, of the class that the sample was made for.

    Args:
        classifier: logits [B, classes] of images [B, C, H, W], differentiable in them; frozen.
        label: the class wanted of every sample; if None, each sample's own label is its condition.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], label: int | None = None) -> None:
        self.classifier, self.label = classifier, label

    def __call__(self, sample: Tensor, condition: Condition) -> Tensor:
        if self.label is not None:
            wanted = torch.full((len(sample),), self.label, device=sample.device)
        elif isinstance(condition, Tensor) and condition.dtype == torch.int64:
            wanted = condition
        else:
            raise ValueError(
                "a classifier's reward needs a label of each sample, but the condition is "
                f"{type(condition).__name__}; use a class-conditional student, or set the label"
            )
        log_p = F.log_softmax(self.classifier(sample).float(), dim=1)
        return log_p.gather(1, wanted[:, None]).squeeze(1)


class DecodedReward:
    """A reward of pictures, for samples that are latents of them.

    Latents are decoded one by one, and again in the backward pass, since a decoder's activations
    are far larger than a denoiser's.

    Args:
        reward: of pictures [B, 3, H, W] in about [-1, 1].
        decoder: from latents to pictures.
    """

    def __init__(self, reward: Reward, decoder: LatentDecoder) -> None:
        self.reward, self.decoder = reward, decoder

    def __call__(self, sample: Tensor, condition: Condition) -> Tensor:
        pictures = [
            checkpoint(self.decoder, latent, use_reentrant=False, preserve_rng_state=False)
            for latent in sample.split(1)
        ]
        return self.reward(torch.cat(pictures), condition)
