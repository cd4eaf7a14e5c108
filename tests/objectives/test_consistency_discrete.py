"""Consistency in discrete steps: its schedules, its boundary, its gradient and its fixed point."""

from __future__ import annotations

import math

import pytest
import torch
from oracle.trajectories import (
    SHAPE,
    ConsistencyFunction,
    Posterior,
    gradients,
    random_cases,
)

from fastdistill.diffusion import (
    EDM,
    VP,
    X0,
    EasyPairs,
    EDMPreconditioning,
    Epsilon,
    Flow,
    ImprovedPairs,
    Noise,
    RectifiedFlow,
    V,
    karras_sigmas,
    reach_of,
)
from fastdistill.models import Denoiser
from fastdistill.objectives import Consistency, ConsistencyMethod

INDEX = torch.arange(200_000)
REACH = reach_of(EDM())


class Steps(EasyPairs):
    """Pairs a fixed factor apart in float64, above a lowest level."""

    def lowest(self, reach):
        return self.q

    def progress(self, step, steps):
        return 0.0

    def sample(self, reach, noise, stream, index, progress):
        above = (2 * noise.normal(stream, index).double()).exp().clamp(0.3, 20)
        return above, above * (1 - self.k)


def method(pairs, source="teacher", **options) -> ConsistencyMethod:
    return ConsistencyMethod(
        name="consistency", student_times=(0.5,), source=source, pairs=pairs, **options
    )


def ratios(pairs, progress, stream="t"):
    return pairs.sample(REACH, Noise(0), stream, INDEX, torch.tensor(float(progress)))


def test_ict_doubles_its_grid_as_published():
    """K = 400k: K' = 50k, and N = 11, 21, 41, ... 1281 (arXiv 2310.14189)."""
    pairs = ImprovedPairs()
    found = [pairs.progress(step, 400_000) + 1 for step in range(0, 400_000, 50_000)]
    assert found == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert pairs.progress(49_999, 400_000) == 10
    assert pairs.progress(2, 3) <= 1280  # training shorter than its doublings


def test_ict_draws_neighbours_of_karras_grid_with_its_discrete_law():
    """p(i) is in proportion to erf((ln s_i+1 - P_m) / (sqrt(2) P_s)) - erf(the same of s_i)."""
    n = 20
    above, below = ratios(ImprovedPairs(), n)
    grid = torch.tensor(karras_sigmas(n + 1)[:-1][::-1])
    i = (below[:, None] - grid).abs().argmin(1)
    torch.testing.assert_close(below, grid[i], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(above, grid[i + 1], rtol=1e-4, atol=1e-6)
    ends = torch.erf((grid.double().log() + 1.1) / (math.sqrt(2) * 2.0))
    expected = ends.diff() / (ends[-1] - ends[0])
    counts = torch.bincount(i, minlength=n) / len(i)
    assert (counts - expected).abs().max() < 5 * math.sqrt(0.25 / len(i))


def test_ict_keeps_to_what_a_process_reaches():
    reach = reach_of(VP.dit())
    above, below = ImprovedPairs().sample(reach, Noise(0), "t", INDEX, torch.tensor(1280.0))
    assert (below >= reach.low).all()
    assert (above <= 80).all()
    assert (above > below).all()
    assert reach_of(RectifiedFlow()) == (0.002, math.inf)


def test_ects_r_draws_near_t_by_stages():
    """r / t = 1 - (1 + 8 sigmoid(-t)) / 2^(stage + 1) where that is positive."""
    pairs = EasyPairs()
    assert [pairs.progress(step, 8) for step in (0, 1, 7)] == [0.5, 0.25, 2.0**-8]
    t, r = ratios(pairs, 2.0**-8)
    share = 1 - (1 + 8 * torch.sigmoid(-t)) / 256
    torch.testing.assert_close(r, torch.where(t * share < 0.002, 0, t * share))
    assert r[(t - 1).abs().argmin()] / 1.0 == pytest.approx(0.987689, abs=1e-3)
    assert t.log().mean() == pytest.approx(-1.1, abs=0.02)
    assert t.log().std() == pytest.approx(2.0, abs=0.03)
    t, r = ratios(pairs, 0.5)
    assert (r[t < 1.9] == 0).all()  # the first stage is diffusion training but for much noise
    assert (r[t > 2.0] > 0).all()


@pytest.mark.parametrize("process", [EDM(), VP.dit(), RectifiedFlow()], ids=lambda p: repr(p)[:3])
@pytest.mark.parametrize("parametrisation", [EDMPreconditioning(), Epsilon(), V(), X0(), Flow()])
def test_the_boundary_holds_whatever_the_network_says(process, parametrisation):
    """f(x, lambda_0) = x / alpha in every process and parametrisation."""
    network = torch.nn.Linear(1, 1)
    denoiser = Denoiser(network, process, parametrisation)
    made = Consistency(denoiser, denoiser, method(ImprovedPairs()), 100)
    low = torch.tensor([made.lowest])
    level = denoiser.level(process.time_of_ratio(low))
    a, b = made._bounded(level, low)
    torch.testing.assert_close(a, 1 / level.alpha)
    assert b == 0


def test_the_boundary_of_edms_preconditioning_is_icts():
    denoiser = Denoiser(torch.nn.Linear(1, 1), EDM(), EDMPreconditioning())
    made = Consistency(denoiser, denoiser, method(ImprovedPairs()), 100)
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 500, dtype=torch.float64)
    a, b = made._bounded(denoiser.level(sigma), sigma)
    torch.testing.assert_close(b, 0.5 * (sigma - 0.002) / (0.25 + sigma**2).sqrt())
    assert (a - 0.25 / ((sigma - 0.002) ** 2 + 0.25)).abs().max() < 0.002


@pytest.mark.parametrize("lowest", [0.0, 0.1])
def test_the_consistency_function_of_a_gaussian_has_no_loss_but_the_solvers(lowest):
    """The residual over the gap is Heun's error: half the step, a quarter of it."""
    for case in random_cases():
        student = case.denoiser(ConsistencyFunction, lowest=lowest)
        losses = []
        for gap in (0.02, 0.01):
            pairs = Steps(q=lowest, k=gap)
            made = Consistency(student, case.denoiser(Posterior), method(pairs, huber=0), 1)
            at = case.batch()
            losses.append(made.student_update(at, at.real).metrics["loss"].mean())
        assert losses[1] < 1e-4
        assert losses[0] / losses[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("lowest", [0.0, 0.1])
def test_the_gradient_of_mean_and_variance_is_autograds(lowest):
    """From data: both branches with one noise, the pseudo-Huber of whole samples, 1 / gap."""
    for case in random_cases():
        student = case.denoiser(ConsistencyFunction, case.mean + 0.3, 0.4, lowest=lowest)
        settings = method(Steps(q=lowest, k=0.2), "data", huber=0.1)
        made = Consistency(student, student, settings, 1)
        student.requires_grad_(True)
        at = case.batch()
        update = made.student_update(at, made.generate(at))
        assert student.network.graphs == [True, False]  # the target has no graph
        update.backward()
        found = gradients(student)

        above, below = settings.pairs.sample(None, at.noise, "consistency-t", at.index, None)
        eps = at.noise.normal("consistency-noise", at.index, SHAPE, torch.float64)
        ends = []
        for ratio in (above, below):
            x = at.real + ratio.view(-1, 1) * eps
            low = torch.where(ratio > lowest, lowest / ratio, 1).view(-1, 1)
            ends.append(low * x + (1 - low) * student.network.denoised(x, ratio.view(-1, 1)))
        c = 0.1 * math.sqrt(SHAPE[0])
        distance = ((ends[0] - ends[1].detach()).square().sum(1) + c**2).sqrt() - c
        loss = distance / (above - below)
        loss.mean().backward()
        assert found == pytest.approx(gradients(student), rel=1e-6)
        torch.testing.assert_close(update.metrics["loss"], loss.detach(), rtol=1e-6, atol=1e-9)


def test_where_r_is_clean_the_target_is_the_sample():
    """ECT's first stage is denoising: gradient and loss are those of D against x_0."""
    case = next(random_cases())
    student = case.denoiser(ConsistencyFunction)

    class Clean(EasyPairs):
        def sample(self, reach, noise, stream, index, progress):
            above = noise.uniform(stream, index).double() + 0.5
            return above, torch.zeros_like(above)

    made = Consistency(student, student, method(Clean(), "data", huber=0), 1)
    at = case.batch()
    loss = made.student_update(at, at.real).metrics["loss"]
    above = at.noise.uniform("consistency-t", at.index).double().view(-1, 1) + 0.5
    x_t = at.real + above * at.noise.normal("consistency-noise", at.index, SHAPE, torch.float64)
    residual = student.network.denoised(x_t, above) - at.real
    torch.testing.assert_close(loss, residual.norm(dim=1).detach() / above.view(-1))


def test_distillation_to_clean_is_the_teachers_denoiser():
    """The last step of the ODE solver is Euler's, which leads to D of the teacher."""
    case = next(random_cases())
    teacher = case.denoiser(Posterior)
    made = Consistency(case.denoiser(ConsistencyFunction), teacher, method(EasyPairs()), 1)
    x_t = torch.randn(4, *SHAPE, dtype=torch.float64)
    above = torch.full((4,), 3.0, dtype=torch.float64)
    level = made.student.level(case.process.time_of_ratio(above))
    x_r, level_r = made._earlier(case.batch(4), x_t, x_t, level, above, torch.zeros_like(above))
    torch.testing.assert_close(x_r / level_r.alpha.view(-1, 1), teacher(x_t, level.t))


def test_the_huber_constant_is_icts_for_cifar():
    """c = 0.00054 sqrt(3072) = 0.02993: below it the loss is quadratic, above a norm."""
    shape = (3, 32, 32)
    student = Denoiser(Offset(0.0), EDM(), X0())
    made = Consistency(student, student, method(Unit(), "data"), 1)
    at = random_batch(shape)
    for offset in (1e-6, 1.0):
        student.network.offset.data.fill_(offset)
        norm = offset * math.sqrt(3072)
        expected = math.sqrt(norm**2 + 0.02993**2) - 0.02993
        assert made.student_update(at, at.real).metrics["loss"] == pytest.approx(expected, rel=2e-3)


class Unit(EasyPairs):
    """From level 1 to the clean sample."""

    def sample(self, reach, noise, stream, index, progress):
        return torch.ones(len(index)), torch.zeros(len(index))


class Offset(torch.nn.Module):
    """D = x_0 + offset, told the clean sample."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor(offset))

    def forward(self, x_t, t, condition):
        return condition + self.offset


def random_batch(shape):
    from fastdistill.objectives import Batch

    real = torch.zeros(2, *shape)
    return Batch(torch.arange(2), Noise(0), 0.5, shape, real, condition=real)


def test_a_student_that_begins_beyond_the_pairs_is_refused():
    denoiser = Denoiser(torch.nn.Linear(1, 1), RectifiedFlow(), Flow())
    settings = method(ImprovedPairs()).model_copy(update={"student_times": (1.0,)})
    with pytest.raises(
        ValueError, match=r"begins at 1, where .* inf, but pairs reach 80: begin at"
    ):
        Consistency(denoiser, denoiser, settings, 10)


def test_guidance_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0, but source data follows no te"):
        method(EasyPairs(), "data", guidance_scale=2.0)
