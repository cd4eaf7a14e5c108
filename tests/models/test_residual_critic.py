"""A critic upon an exact teacher: equal to it at first, and to any denoiser that it can learn."""

from __future__ import annotations

import copy

import pytest
import torch

from fastdistill.config import RecipeError, load_recipe
from fastdistill.diffusion import EDM, VP, EDMPreconditioning, Epsilon, GaussianMixture
from fastdistill.models import Denoiser, ExactDenoiser, ResidualCritic
from fastdistill.models.digits import DigitsNetwork

KINDS = [(EDM(), EDMPreconditioning(0.5), 0.7), (VP.dit(), Epsilon(), 300.0)]


def critic_of(process, parametrisation) -> tuple[ResidualCritic, Denoiser]:
    torch.manual_seed(0)
    mixture = GaussianMixture(torch.randn(3, 2).double(), 0.1 + torch.rand(3, 2).double())
    network = DigitsNetwork((2,), 0, width=16, blocks=2).double()
    torch.nn.init.normal_(network.leave[1].weight)
    trained = Denoiser(network, process, parametrisation)
    before = copy.deepcopy(trained)
    return ResidualCritic(ExactDenoiser(mixture, process).double(), trained), before


@pytest.mark.parametrize(("process", "parametrisation", "time"), KINDS)
def test_it_begins_at_the_exact_teacher(process, parametrisation, time):
    critic, _ = critic_of(process, parametrisation)
    x_t, t = torch.randn(5, 2).double(), torch.full((5,), time, dtype=torch.float64)
    exact = critic.network._base[0]
    assert torch.equal(critic(x_t, t), exact(x_t, t))
    assert critic.loss_space == parametrisation


@pytest.mark.parametrize(("process", "parametrisation", "time"), KINDS)
def test_the_network_speaks_in_its_own_parametrisation(process, parametrisation, time):
    critic, before = critic_of(process, parametrisation)
    critic.network.trained.load_state_dict(before.state_dict())
    x_t, t = torch.randn(5, 2).double(), torch.full((5,), time, dtype=torch.float64)
    a = before.level(t).coefficients.a[:, None]
    expected = critic.network._base[0](x_t, t) + before(x_t, t) - a * x_t
    torch.testing.assert_close(critic(x_t, t), expected)


def test_only_the_network_is_trained_and_saved():
    critic, before = critic_of(*KINDS[0][:2])
    names = {f"network.trained.{name}" for name in before.state_dict()}
    assert set(critic.state_dict()) == names
    assert {name for name, _ in critic.named_parameters()} <= names
    x_t = torch.randn(5, 2, requires_grad=True, dtype=torch.float64)
    critic(x_t, torch.ones(5).double()).sum().backward()
    assert x_t.grad.abs().min() > 0, (
        "methods that pass gradients through the critic need its base's"
    )
    assert critic.network.trained.network.leave[1].weight.grad.abs().max() > 0


def test_it_is_refused_without_an_exact_teacher():
    with pytest.raises(RecipeError, match="upon an exact teacher: set"):
        load_recipe("mixture_2d", ["model.residual_critic=true", "teacher.exact=false"])
    section = "{nodes: 2, training: {steps: 8, batch_size: 8, student: {lr: 1e-3}}}"
    with pytest.raises(RecipeError, match="an exact teacher has none"):
        load_recipe("mixture_2d", [f"degradation={section}", "objective=backtracking"])
