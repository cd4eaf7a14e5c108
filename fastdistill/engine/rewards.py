"""The rewards that recipes name."""

from __future__ import annotations

import torch

from fastdistill.choices import Linear, Quadratic, RewardChoice
from fastdistill.config import RecipeError
from fastdistill.engine.pictures import find_decoder
from fastdistill.objectives import (
    ClassifierReward,
    DecodedReward,
    LinearReward,
    QuadraticReward,
    Reward,
)


def make_reward(choice: RewardChoice, teacher: str | None, device: torch.device) -> Reward:
    """A recipe's reward, with the networks that it needs on the device.

    Args:
        choice: the recipe's.
        teacher: the pipeline whose VAE decodes latents.
        device: where the samples are.

    Raises:
        RecipeError: for pictures of latents of a teacher that has no VAE.
    """
    reward = _reward(choice, device)
    if not choice.decode:
        return reward
    decoder = None if teacher is None else find_decoder(teacher, device)
    if decoder is None:
        raise RecipeError(
            f"objective.reward.decode: teacher {teacher} has no VAE; give a diffusers pipeline's "
            "folder, or turn it off"
        )
    return DecodedReward(reward, decoder)


def _reward(choice: RewardChoice, device: torch.device) -> Reward:
    if isinstance(choice, Linear):
        return LinearReward(choice.slope)
    if isinstance(choice, Quadratic):
        return QuadraticReward(choice.target)
    from fastdistill.evaluate import digits_classifier

    return ClassifierReward(digits_classifier().to(device), choice.label)
