"""Score projection on networks with preconditioning, in recipes and in training."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from fastdistill.config import RecipeError, load_recipe
from fastdistill.diffusion import EDM, EDMPreconditioning, Epsilon, LogNormalSigma, Noise
from fastdistill.engine.roles import make_objective
from fastdistill.models import Denoiser
from fastdistill.models.digits import DigitsNetwork
from fastdistill.objectives import (
    Batch,
    Discriminator,
    ScoreProjection,
    ScoreProjectionMethod,
)
from fastdistill.objectives.denoising import drop_conditions
from fastdistill.objectives.distances import get_distance
from fastdistill.ops import Distance, use_backend

COUNT = 6
LAW = LogNormalSigma(-0.5, 1.2)


def denoiser(seed: int, parametrisation=None) -> Denoiser:
    torch.manual_seed(seed)
    network = DigitsNetwork(width=24, blocks=2).double()
    torch.nn.init.normal_(network.leave[1].weight, std=0.2)
    return Denoiser(network, EDM(), parametrisation or EDMPreconditioning())


def objective(
    teacher: Denoiser | None = None, critic: Denoiser | None = None, **changes
) -> ScoreProjection:
    chosen = ScoreProjectionMethod(name="score_projection", student_times=(2.5,), **changes)
    discriminator = None
    if chosen.needs_discriminator:
        torch.manual_seed(3)
        discriminator = Discriminator([(24,), (24,)])
    return ScoreProjection(
        denoiser(0),
        teacher or denoiser(1),
        critic or denoiser(2),
        chosen.student_times,
        LAW,
        LAW,
        chosen,
        discriminator=discriminator,
    )


def batch(**changes) -> Batch:
    labels = torch.arange(COUNT)
    made = Batch(torch.arange(COUNT), Noise(0), 1 / COUNT, (1, 8, 8), None, labels, 0 * labels + 10)
    return dataclasses.replace(made, **changes)


def sample_of(method: ScoreProjection, at: Batch) -> Tensor:
    noise = at.noise.normal("latents", at.index, at.shape, torch.float64)
    t = torch.full((COUNT,), 2.5, dtype=torch.float64)
    return method.student(2.5 * noise, t, at.condition)


def frozen_gradients(method: ScoreProjection, at: Batch) -> list[Tensor]:
    """Gradients of the student, with the critic frozen as the trainer does."""
    for role in method.frozen_roles():
        method.critic_modules()[role].requires_grad_(False)
    method.student_update(at, sample_of(method, at)).backward()
    return [value.grad for value in method.student.parameters()]


@pytest.mark.parametrize(
    "kinds",
    [(None, None), (None, Epsilon()), (Epsilon(), None)],
    ids=["one kind", "scaled teacher", "scaled critic"],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_students_gradient_is_autograds_through_both_networks(
    kinds, guidance_scale, normalise, reference_backend
):
    """Through renoising, c_in and both denoisers, against the loss as a graph in float64."""
    alpha, weight = 1.2, 0.5
    method = objective(
        *(denoiser(seed, kind) for seed, kind in enumerate(kinds, start=1)),
        alpha=alpha,
        projection_weight=weight,
        normalise=normalise,
        guidance_scale=guidance_scale,
    )
    at = batch()
    found = frozen_gradients(method, at)

    student, teacher = copy.deepcopy(method.student), method.teacher
    for value in student.parameters():
        value.grad = None
    method.student = student
    x = sample_of(method, at)
    t = LAW.sample(EDM(), at.noise, "matching-t", at.index)
    eps = at.noise.normal("matching-noise", at.index, at.shape, torch.float64)
    x_t = x + t.double().view(-1, 1, 1, 1) * eps
    none, given = (teacher(x_t, t, c) for c in (at.uncondition, at.condition))
    d_phi = none + guidance_scale * (given - none)
    d_psi = method.critic(x_t, t, at.condition)
    gap = d_phi - d_psi
    loss = 2 * (gap * (d_phi - x - alpha * gap)).flatten(1).sum(1)
    if normalise:
        loss = loss / (x - d_phi).abs().flatten(1).mean(1).detach()
    (weight * loss.mean() / 64).backward()
    for mine, value in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(mine, value.grad, rtol=1e-5, atol=1e-8)


def test_only_the_role_that_is_updated_receives_gradients():
    with use_backend("reference"):
        method = objective(gan_weight=0.1)
        at = batch(real=torch.randn(COUNT, 1, 8, 8, dtype=torch.float64))
        student = frozen_gradients(method, at)
        critics = [p for m in method.critic_modules().values() for p in m.parameters()]
        assert all(value is not None for value in student)
        assert all(value.grad is None for value in (*critics, *method.teacher.parameters()))
        for value in method.student.parameters():
            value.grad = None
        for module in method.critic_modules().values():
            module.requires_grad_(True)
        method.critic_update(at, sample_of(method, at).detach()).backward()
        assert all(value.grad is None for value in method.student.parameters())
        assert all(value.grad is None for value in method.teacher.parameters())
        assert all(value.grad is not None for value in critics)


def test_real_and_generated_samples_share_noise_and_level(monkeypatch):
    """SiDA: what the discriminator is shown differs by real - fake alone, times c_in."""
    method = objective(gan_weight=0.1)
    at = batch(real=torch.randn(COUNT, 1, 8, 8, dtype=torch.float64))
    sample = sample_of(method, at).detach()
    seen = []
    hidden = method.critic.network._hidden
    monkeypatch.setattr(
        method.critic.network, "_hidden", lambda *args: seen.append(args) or hidden(*args)
    )
    method.critic_update(at, sample)
    (fake, level, *_), (real, real_level, *_) = seen
    torch.testing.assert_close(level, real_level)
    c_in = ((4 * level).exp().square() + 0.25).rsqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(real - fake, c_in * (at.real - sample), rtol=1e-5, atol=1e-6)


def test_critic_learns_without_conditions_as_often_as_asked():
    at = batch(index=torch.arange(4000))
    condition = {"labels": torch.arange(4000), "tokens": torch.randn(4000, 2, 3)}
    null = {"labels": torch.full((4000,), -1), "tokens": torch.zeros(4000, 2, 3)}
    at = dataclasses.replace(at, condition=condition, uncondition=null)
    found = drop_conditions(at, 0.3, "stream")
    dropped = found["labels"] == -1
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert (found["tokens"][dropped] == 0).all()
    torch.testing.assert_close(found["tokens"][~dropped], condition["tokens"][~dropped])
    with pytest.raises(ValueError, match="null condition"):
        drop_conditions(dataclasses.replace(at, uncondition=None), 0.3, "stream")


@pytest.mark.parametrize("gan_weight", [0.0, 0.1])
def test_the_critics_update_is_shown_null_conditions_and_the_students_is_not(
    gan_weight, monkeypatch
):
    method = objective(critic_condition_dropout=0.5, gan_weight=gan_weight)
    at = batch(real=torch.randn(COUNT, 1, 8, 8, dtype=torch.float64))
    seen = []
    hidden = method.critic.network._hidden
    monkeypatch.setattr(
        method.critic.network, "_hidden", lambda *args: seen.append(args[2]) or hidden(*args)
    )
    sample = sample_of(method, at)
    method.student_update(at, sample)
    torch.testing.assert_close(seen.pop(), at.condition)
    method.critic_update(at, sample.detach())
    for condition in seen:
        assert 0 < int((condition == 10).sum()) < COUNT
        torch.testing.assert_close(condition, seen[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("squared_l2", Distance.squared_l2()),
        ("l1", Distance.l1()),
        ("power:3", Distance.power(3)),
        ("pseudo_huber:0.5", Distance.pseudo_huber(0.5)),
        ("pseudo_huber", Distance.pseudo_huber(0.00054 * 8)),
    ],
)
def test_distances_have_names(name, expected):
    assert get_distance(name, 64) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["l2", "power", "power:0.5", "pseudo_huber:-1", "l1:3", "power:x"])
def test_wrong_distances_are_refused(name):
    with pytest.raises(ValueError, match="distance"):
        get_distance(name)


METHODS = {
    "score_projection": (),
    "sim": (),
    "sid": (),
    "sida": (),
    "diff_instruct_star": ("objective.reward=linear", "objective.reward_weight=0.01"),
    "diff_instruct_plus_plus": ("objective.reward=quadratic", "objective.reward_weight=1"),
    "esd": (),
}


@pytest.mark.parametrize("name", METHODS)
def test_recipes_make_each_method(name):
    recipe = load_recipe("digits", [f"objective={name}", *METHODS[name]])
    network = DigitsNetwork(width=recipe.model.width, blocks=recipe.model.blocks)
    made = make_objective(recipe, Denoiser(network, EDM(), EDMPreconditioning()))
    assert made.student_times == list(recipe.objective.student_times)
    assert ("discriminator" in made.critic_modules()) == (name == "sida")
    update = made.student_update(at := batch(real=torch.randn(COUNT, 1, 8, 8)), made.generate(at))
    assert all(torch.isfinite(value).all() for value in update.metrics.values())
    assert ("reward" in update.metrics) == name.startswith("diff_instruct_")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=sim", "objective.distance=l3"], "distance 'l3' is unknown"),
        (["objective=sim", "objective.reward=linear"], "set both, or neither"),
        (["objective=sim", "objective.reward=lineal"], "did you mean 'linear'"),
        (["objective=diff_instruct_star"], "objective.reward is missing"),
        (["objective=sida", "training.discriminator=null"], "training.discriminator is missing"),
        (["objective.entropy_weight=0.5"], "critic_condition_dropout"),
        (
            ["objective.share_critic_forward=true", "objective.critic_condition_dropout=0.1"],
            "share_critic_forward is not for critic_condition_dropout",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(RecipeError) as error:
        load_recipe("digits", overrides)
    assert message in str(error.value)


def test_methods_say_what_they_read_before_they_start():
    def method(*overrides):
        return load_recipe("digits", [*overrides]).objective

    assert not method("objective=sid").needs_real
    assert method("objective=sida").needs_real
    assert not method("objective=sid").needs_null
    assert method("objective=sid", "objective.critic_condition_dropout=0.1").needs_null
    assert method("objective=esd").needs_null


def test_a_discriminator_and_a_gan_weight_go_together():
    method = objective()
    with pytest.raises(ValueError, match="GAN term needs"):
        ScoreProjection(
            *(denoiser(seed) for seed in (0, 1, 2)),
            (2.5,),
            LAW,
            LAW,
            method.settings,
            discriminator=Discriminator([(24,)]),
        )
