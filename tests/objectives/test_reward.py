"""Rewards: what they give, what they send into samples, and how recipes name them."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
import torch.nn.functional as F

from fastdistill.choices import Linear, OfDigitsClassifier, Quadratic
from fastdistill.config import RecipeError
from fastdistill.engine.encoders import PipelineEncoder
from fastdistill.engine.rewards import make_reward
from fastdistill.evaluate import digits_classifier
from fastdistill.models.latents import LatentDecoder
from fastdistill.objectives import (
    ClassifierReward,
    DecodedReward,
    LinearReward,
    QuadraticReward,
)
from fastdistill.objectives.reward import reward_cotangent


@pytest.fixture(scope="module")
def classifier():
    return digits_classifier()


@pytest.mark.parametrize("reward", [LinearReward(2.0), QuadraticReward(0.5)], ids=["line", "bowl"])
def test_cotangent_is_minus_the_gradient_of_the_scaled_sum(reward):
    sample = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    expected = -0.3 * reward(sample, None).sum()
    (gradient,) = torch.autograd.grad(expected, sample)
    found = reward_cotangent(reward, sample, None, 0.3)
    torch.testing.assert_close(found.cotangent, gradient)
    torch.testing.assert_close(found.reward, reward(sample, None).detach())
    assert not found.reward.requires_grad


def test_cotangent_is_made_where_gradients_are_off():
    with torch.no_grad():
        found = reward_cotangent(LinearReward(), torch.zeros(2, 4), None, 1.0)
    torch.testing.assert_close(found.cotangent, torch.full((2, 4), -0.25))


@pytest.mark.parametrize(
    "reward", [lambda x, c: x.mean(), lambda x, c: x.detach().flatten(1).mean(1)]
)
def test_a_reward_that_is_no_differentiable_number_a_sample_is_refused(reward):
    with pytest.raises(ValueError, match="differentiable"):
        reward_cotangent(reward, torch.zeros(2, 4), None, 1.0)


def test_classifier_rewards_the_class_that_a_sample_was_made_for(classifier):
    images = torch.randn(4, 1, 8, 8)
    labels = torch.tensor([3, 1, 4, 9])
    reward = ClassifierReward(classifier)
    expected = -F.cross_entropy(classifier(images), labels, reduction="none")
    torch.testing.assert_close(reward(images, labels), expected)
    torch.testing.assert_close(
        ClassifierReward(classifier, 7)(images, None), reward(images, torch.full((4,), 7))
    )
    with pytest.raises(ValueError, match="needs a label"):
        reward(images, None)


def test_steps_along_the_cotangent_make_noise_a_seven(classifier):
    torch.manual_seed(0)
    images, reward = torch.randn(8, 1, 8, 8), ClassifierReward(classifier, 7)
    before = reward(images, None).mean()
    for _ in range(30):
        images = images - reward_cotangent(reward, images, None, 1.0).cotangent
    assert reward(images, None).mean() > before + 1
    assert all(value.grad is None for value in classifier.parameters())


def _vae(**config):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=2,
        **config,
    )


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 0.5, "shift_factor": 0.3},
        {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2], "latents_std": [2.0, 3.0]},
    ],
    ids=["scale", "shift", "channels"],
)
def test_decoding_undoes_what_encoding_does_to_latents(config):
    """z -> latents as `fastdistill encode` scales them -> z."""
    vae = _vae(**config)
    encoder = PipelineEncoder.__new__(PipelineEncoder)
    encoder._vae = vae
    z = torch.randn(3, 2, 4, 4)
    expected = vae.decode(z).sample
    torch.testing.assert_close(LatentDecoder(vae)(encoder._scale(z)), expected)


def test_a_decoded_reward_reaches_the_latents_through_the_frozen_vae():
    decoder = LatentDecoder(_vae(scaling_factor=0.5))
    latents = torch.randn(3, 2, 4, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(decoder(latents).flatten(1).mean(1).sum(), latents)
    found = reward_cotangent(DecodedReward(LinearReward(), decoder), latents, None, 1.0)
    torch.testing.assert_close(found.cotangent, -expected)
    assert expected.abs().max() > 0
    assert all(value.grad is None for value in decoder.vae.parameters())


def test_recipes_name_rewards(classifier, monkeypatch):
    monkeypatch.setattr("fastdistill.evaluate.digits_classifier", lambda: classifier)
    cpu = torch.device("cpu")
    sample = torch.randn(2, 1, 8, 8)
    found = make_reward(Linear(name="linear", slope=3.0), None, cpu)
    torch.testing.assert_close(found(sample, None), 3 * sample.flatten(1).mean(1))
    found = make_reward(Quadratic(name="quadratic", target=1.0), None, cpu)
    assert float(found(torch.ones(1, 4), None)) == 0
    found = make_reward(OfDigitsClassifier(name="digits_classifier", label=3), None, cpu)
    torch.testing.assert_close(found(sample, None), ClassifierReward(classifier, 3)(sample, None))


def test_a_teachers_vae_decodes_for_the_reward(tmp_path):
    vae = _vae(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    index = {"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    choice = Linear(name="linear", decode=True)
    reward = make_reward(choice, str(tmp_path), torch.device("cpu"))
    latents = torch.randn(2, 2, 4, 4)
    expected = LatentDecoder(copy.deepcopy(vae))(latents).flatten(1).mean(1)
    torch.testing.assert_close(reward(latents, None), expected)
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(RecipeError, match="has no VAE"):
        make_reward(choice, str(tmp_path), torch.device("cpu"))
