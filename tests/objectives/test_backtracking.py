"""DisBack: the degradation path in closed form, the order of its nodes, and who is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_distribution_matching import GaussianNetwork, Shift, batch, student_gradient
from torch import Tensor, nn

from fastdistill.config import RecipeError, load_recipe
from fastdistill.diffusion import EDM, VP, X0, FixedList, RectifiedFlow
from fastdistill.models import Denoiser
from fastdistill.objectives import (
    Backtracking,
    Degradation,
    DistributionMatching,
    MatchingSettings,
)
from fastdistill.objectives.denoising import denoising_pair

SIGMA = 0.5


class Affine(nn.Module):
    """Denoiser gain * x_t + shift."""

    def __init__(self, gain: float, shift: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor, noise_condition: Tensor, condition: object) -> Tensor:
        return self.gain.to(x.dtype) * x + self.shift.to(x.dtype)


def path_of(moments: np.ndarray, target: np.ndarray, start: np.ndarray, rate: float, steps: int):
    """theta_k = theta_S + (1 - 2 rate M)^k (theta_T - theta_S), with M theta_S = target."""
    end = np.linalg.solve(moments, target)
    return end + np.linalg.matrix_power(np.eye(2) - 2 * rate * moments, steps) @ (start - end)


def descend(
    process, time: float, mean: float, variance: float, start: tuple[float, float], rate, steps
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Gain and shift after gradient descent on data N(mean, variance), found and in closed form.

    Expectations over x_0 and eps are sums over a quadrature, float64.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(6)
    z, eps = (torch.from_numpy(v).flatten() for v in np.meshgrid(points, points, indexing="ij"))
    quadrature = torch.from_numpy(np.outer(weights, weights).flatten() / weights.sum() ** 2)
    denoiser = Denoiser(Affine(*start), process, X0())
    level = denoiser.level(torch.full_like(z, time))
    alpha, sigma = float(level.alpha[0]), float(level.sigma[0])
    x_0 = (mean + variance**0.5 * z)[:, None]
    x_t = alpha * x_0 + sigma * eps[:, None]
    for _ in range(steps):
        raw = denoiser.network(x_t, level.noise_condition, None)
        (raw, cotangent), _ = denoising_pair(raw, x_0, x_t, level, X0(), 1.0)
        gradients = torch.autograd.grad(
            raw, list(denoiser.network.parameters()), quadrature[:, None] * cotangent
        )
        with torch.no_grad():
            for value, gradient in zip(denoiser.network.parameters(), gradients, strict=True):
                value -= rate * gradient
    first, second = alpha * mean, alpha**2 * (variance + mean**2) + sigma**2
    moments = np.array([[second, first], [first, 1.0]])
    target = np.array([alpha * (variance + mean**2), mean])
    expected = path_of(moments, target, np.array(start), rate, steps)
    return tuple(float(v.detach()) for v in denoiser.network.parameters()), tuple(expected)


def test_the_path_has_its_published_value(reference_backend):
    """v_p = 1, v = 0.3, sigma = 0.8, eta = 0.05, k = 30: a_k = 0.334186."""
    teacher = 1 / (1 + 0.64)
    found, expected = descend(EDM(), 0.8, 0.0, 0.3, (teacher, 0.0), 0.05, 30)
    assert found[0] == pytest.approx(0.334186, abs=5e-7)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("process", "time"), [(EDM(), 0.6), (VP.dit(), 300.0), (RectifiedFlow(), 0.5)]
)
def test_gain_and_shift_go_the_path_in_closed_form(process, time, reference_backend):
    generator = np.random.default_rng()
    mean, variance, gain, shift = generator.uniform((0.2, 0.2, 0.4, -0.3), (0.9, 0.8, 0.9, 0.3))
    found, expected = descend(process, time, mean, variance, (gain, shift), 0.05, 12)
    assert found == pytest.approx(expected, rel=1e-10), (mean, variance, gain, shift)
    assert found != pytest.approx((gain, shift), rel=1e-4), "it moved"


@pytest.mark.parametrize(
    ("process", "time"), [(EDM(), 0.6), (VP.dit(), 300.0), (RectifiedFlow(), 0.5)]
)
def test_the_objective_learns_the_generators_samples(process, time):
    """Gradient descent on one large batch follows the path of that batch's own moments."""
    generator = Denoiser(Shift(0.8, 0.6), process, X0())
    method = Degradation(
        Denoiser(Affine(0.61, 0.1), process, X0()), generator, (time,), FixedList((time,))
    )
    at = batch(4096)
    sample = method.generate(at)
    assert not sample.requires_grad
    alpha, sigma = (float(v) for v in process.alpha_sigma(torch.tensor(time)))
    x_t = (alpha * sample + sigma * at.noise.normal("degradation-noise", at.index, (1,))).double()
    x_0 = sample.double()
    for _ in range(10):
        method.zero_grad()
        method.student_update(at, method.generate(at)).backward()
        with torch.no_grad():
            for value in method.student.parameters():
                value -= 0.05 * value.grad
    moments = np.array([[float((x_t**2).mean()), float(x_t.mean())], [float(x_t.mean()), 1.0]])
    target = np.array([float((x_t * x_0).mean()), float(x_0.mean())])
    expected = path_of(moments, target, np.array([0.61, 0.1]), 0.05, 10)
    found = tuple(float(value.detach()) for value in method.student.parameters())
    assert found == pytest.approx(tuple(expected), abs=2e-5)
    assert list(generator.network.state_dict().values()) == [0.8, pytest.approx(0.6)]
    assert list(method.state_dict()) == ["student.network.gain", "student.network.shift"]


class InMemory:
    """A path of Gaussians whose last node is the student's."""

    nodes = ((0.0, 1.0), (0.3, 0.9), (0.5, 0.8), (0.8, 0.6))

    def __init__(self) -> None:
        self.read: list[int] = []

    @property
    def last(self) -> int:
        return len(self.nodes) - 1

    def load_(self, number: int, network: nn.Module) -> None:
        self.read.append(number)
        with torch.no_grad():
            for value, new in zip(network.parameters(), self.nodes[number], strict=True):
                value.copy_(torch.tensor(new))


def networks(teacher: tuple[float, float] = (0.0, 1.0)) -> tuple[Denoiser, ...]:
    return (
        Denoiser(Shift(0.8, 0.6), EDM(), X0()),
        Denoiser(GaussianNetwork(*teacher), EDM(), X0()),
        Denoiser(GaussianNetwork(0.8, 0.6), EDM(), X0()),
    )


def rest() -> tuple:
    return (1.0,), FixedList((SIGMA,)), FixedList((SIGMA,))


def backtracking(path: InMemory, interval: int = 5) -> Backtracking:
    settings = MatchingSettings(normalise=False)
    return Backtracking(*networks(), *rest(), settings=settings, path=path, interval=interval)


def test_the_target_is_one_node_after_the_other_by_the_step_alone():
    method, path = backtracking(InMemory()), InMemory()
    assert [method.target(step) for step in (0, 4, 5, 9, 10, 11, 1000)] == [2, 2, 1, 1, 0, 0, 0]
    method.path = path
    for step in range(12):
        method.before_step(step)
    assert path.read == [2, 1, 0], "each is read once"
    method.before_step(7)  # as a resume does
    assert path.read[-1] == 1


def test_the_student_is_matched_to_the_node_at_hand_and_at_last_to_the_teacher():
    """The gradient is that of distribution matching to each node, for mean and scale."""
    method = backtracking(InMemory())
    addresses = [value.data_ptr() for value in method.teacher.parameters()]
    for step, node in ((0, 2), (5, 1), (10, 0)):
        method.before_step(step)
        student, teacher, critic = networks(InMemory.nodes[node])
        plain = DistributionMatching(
            student, teacher, critic, *rest(), settings=MatchingSettings(normalise=False)
        )
        found = student_gradient(method, batch(2000))
        assert found == student_gradient(plain, batch(2000))
        assert all(abs(value) > 1e-3 for value in found)
    kept = [value.data_ptr() for value in method.teacher.parameters()]
    assert kept == addresses, "a CUDA graph reads where it did"


def test_networks_that_share_weights_with_the_teacher_are_refused():
    student, teacher, critic = networks()
    for given, role in (
        ((student, critic, critic), "critic"),
        ((critic, critic, teacher), "student"),
    ):
        with pytest.raises(ValueError, match=f"{role}.*shares weights with the teacher"):
            Backtracking(*given, *rest(), path=InMemory(), interval=1)


def test_an_objective_without_a_path_takes_no_step():
    method = Backtracking(*networks(), *rest(), path=None, interval=1)
    with pytest.raises(ValueError, match="has no degradation path"):
        method.before_step(0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["degradation=null"], "degradation is missing"),
        (["degradation.nodes=3"], "which 3 nodes do not divide"),
        (["objective.interval=700"], "leave none of training.steps, 2000"),
        (["parallel.teacher=sharded"], "parallel.teacher is sharded"),
        (["degradation.training.critic={lr: 1}"], "a degradation's training has no use for it"),
    ],
)
def test_a_recipe_that_could_not_go_the_path_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits", ["objective=backtracking", *overrides])


def test_half_of_the_training_is_for_the_nodes_where_nothing_else_is_said():
    recipe = load_recipe("digits", ["objective=backtracking"])
    assert recipe.objective.steps_per_node(recipe.degradation.nodes, recipe.training.steps) == 333
    assert load_recipe("digits").degradation == recipe.degradation, "in one word of a recipe"


def test_low_rank_weights_upon_the_teacher_are_refused():
    overrides = [
        "objective=backtracking",
        "objective.student_times=[399]",
        "degradation={nodes: 1}",
    ]
    overrides += ["degradation.training={steps: 1, batch_size: 1, student: {lr: 1}}"]
    with pytest.raises(RecipeError, match="critic_lora puts low-rank weights upon the teacher"):
        load_recipe("sdxl_dmd2_4step", [*overrides, "model.critic_lora=4"])
