"""Passes that serve two purposes give the gradients of two passes, in float64, and run once."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastdistill.diffusion import EDM, EDMPreconditioning, LogNormalSigma, Noise
from fastdistill.models import Denoiser
from fastdistill.models.digits import DigitsNetwork
from fastdistill.objectives import (
    Batch,
    Discriminator,
    DistributionMatching,
    MatchingSettings,
    get_divergence,
    logistic_cotangent,
)
from fastdistill.objectives.denoising import denoising_pair, denoising_update, noised_for

COUNT, SCALE = 6, 1 / 6
MATCHING, CRITIC = LogNormalSigma(-0.5, 1.2), LogNormalSigma(0.3, 0.9)
GAN = {"gan_weight": 0.1, "divergence": get_divergence("jensen_shannon")}


def denoiser(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    network = DigitsNetwork(width=24, blocks=2).double()
    torch.nn.init.normal_(network.leave[1].weight, std=0.2)
    return Denoiser(network, EDM(), EDMPreconditioning())


def objective(**settings) -> DistributionMatching:
    chosen = MatchingSettings(**settings)
    discriminator = None
    if chosen.needs_discriminator:
        torch.manual_seed(3)
        discriminator = _Double([(24,), (24,)])
    made = DistributionMatching(
        *(denoiser(seed) for seed in (0, 1, 2)),
        student_times=(2.5,),
        matching_law=MATCHING,
        critic_law=CRITIC,
        discriminator=discriminator,
        settings=chosen,
    )
    return made


class _Double(Discriminator):
    """The discriminator in float64."""

    def __init__(self, shapes) -> None:
        super().__init__(shapes)
        self.double()

    def forward(self, features):
        pairs = zip(self.heads, features, strict=True)
        return torch.cat([head(value) for head, value in pairs], dim=1)


def batch() -> Batch:
    labels = torch.arange(COUNT)
    real = torch.randn(COUNT, 1, 8, 8, dtype=torch.float64, generator=_generator())
    return Batch(
        torch.arange(COUNT), Noise(7).at(5), SCALE, (1, 8, 8), real, labels, labels * 0 + 10
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def sample_of(made: DistributionMatching, at: Batch) -> Tensor:
    noise = at.noise.normal("latents", at.index, (1, 8, 8)).double() * 2.5
    return made.student(noise, torch.full((COUNT,), 2.5), at.condition)


def gradients(module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


@contextlib.contextmanager
def frozen(made: DistributionMatching):
    """As the trainer freezes what the student's update leaves alone."""
    values = [
        value for role in made.frozen_roles() for value in made.critic_modules()[role].parameters()
    ]
    for value in values:
        value.requires_grad_(False)
    yield
    for value in values:
        value.requires_grad_(True)


def whole_turn(made: DistributionMatching) -> dict[str, dict[str, Tensor]]:
    """Gradients of a student's turn, as the trainer goes through it."""
    at = batch()
    sample = sample_of(made, at)
    with frozen(made):
        update = made.student_update(at, sample)
    update.backward()
    student = copy.deepcopy(gradients(made.student))
    assert not gradients(made.critic)  # the student's turn leaves the critic alone
    shared = {} if update.shared is None else {"shared": update.shared}
    made.critic_update(at, sample.detach(), **shared).backward()
    assert_same(gradients(made.student), student)  # and the critic's the student
    modules = made.critic_modules()
    return {"student": student} | {role: gradients(module) for role, module in modules.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, wanted in expected.items():
        assert wanted.dtype == torch.float64
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-14, msg=name)


def count_passes(module: torch.nn.Module) -> Counter:
    """Counts passes of a network through its first layer, by whether they keep a graph."""
    passes: Counter = Counter()
    hook = lambda *_: passes.update([torch.is_grad_enabled()])  # noqa: E731
    module.network.enter.register_forward_hook(hook)
    return passes


@pytest.mark.parametrize("options", [{}, GAN], ids=["alone", "with GAN on the teacher"])
def test_a_shared_critic_forward_gives_both_gradients_of_two_forwards(options):
    found = whole_turn(objective(share_critic_forward=True, **options))
    apart = objective(**options)
    expected = whole_turn(apart)
    assert_same(found["student"], expected["student"])
    if "discriminator" in expected:
        assert_same(found["discriminator"], expected["discriminator"])
    # The critic's by a forward of its own at the student's (x_t, t).
    for value in apart.critic.parameters():
        value.grad = None
    at = batch()
    own, _, _ = denoising_update(
        apart.critic,
        at,
        sample_of(apart, at).detach(),
        MATCHING,
        apart.critic_loss_space,
        "matching",
    )
    torch.autograd.backward(*own)
    assert_same(found["critic"], gradients(apart.critic))


def test_a_shared_critic_forward_is_one_pass_instead_of_two():
    apart, shared = objective(), objective(share_critic_forward=True)
    passes = [count_passes(made.critic) for made in (apart, shared)]
    whole_turn(apart), whole_turn(shared)
    assert passes == [{False: 1, True: 1}, {True: 1}]


def test_on_its_own_turn_the_critic_keeps_its_law():
    made, plain = objective(share_critic_forward=True), objective()
    at = batch()
    sample = sample_of(made, at).detach()
    made.critic_update(at, sample).backward()
    plain.critic_update(at, sample).backward()
    assert_same(gradients(made.critic), gradients(plain.critic))


def features_by_passes_of_their_own(made: DistributionMatching, at: Batch, sample: Tensor) -> None:
    """Critic's and discriminator's gradients with a pass for each purpose, at one (x_t, t)."""
    critic, law = made.critic, CRITIC
    fake, real = (noised_for(critic, at, value, law, "critic") for value in (sample, at.real))
    level = fake.level
    raw = critic.network(fake.model_input, level.noise_condition, at.condition)
    space = made.critic_loss_space
    (raw, cotangent), _ = denoising_pair(raw, sample, fake.x_t, level, space, SCALE)
    pairs = [(raw, cotangent)]
    for noised, is_real in ((fake, False), (real, True)):
        features = critic.network.features(noised.model_input, level.noise_condition, at.condition)
        logits = made.discriminator(features)
        scale = made.settings.gan_critic_weight * SCALE
        pairs.append((logits, logistic_cotangent(logits, is_real, scale).cotangent))
    for pair in pairs:
        torch.autograd.backward(*pair)


def test_features_from_the_critics_own_pass_give_the_gradients_of_passes_of_their_own():
    settings = {**GAN, "gan_features": "critic", "gan_critic_weight": 0.3}
    shared, apart = objective(share_feature_forward=True, **settings), objective(**settings)
    at = batch()
    sample = sample_of(shared, at).detach()
    passes = count_passes(shared.critic)
    shared.critic_update(at, sample).backward()
    assert passes == {True: 2}  # one of all on generated samples, one of features on real ones
    features_by_passes_of_their_own(apart, at, sample)
    for role in ("critic", "discriminator"):
        module, expected = shared.critic_modules()[role], apart.critic_modules()[role]
        assert_same(gradients(module), gradients(expected))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"share_feature_forward": True}, "share_feature_forward is for a discriminator"),
        ({"share_feature_forward": True, **GAN}, "set gan_features: critic"),
        (
            {"share_critic_forward": True, **GAN, "gan_features": "critic"},
            "share_critic_forward is not for gan_features: critic",
        ),
    ],
)
def test_a_share_of_nothing_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        MatchingSettings(**settings)
