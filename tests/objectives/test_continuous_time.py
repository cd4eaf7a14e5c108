"""sCM and MeanFlow: closed forms on Gaussians, derivatives both ways, and a second time."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from oracle.trajectories import (
    SHAPE,
    AverageVelocity,
    Case,
    ConsistencyFunction,
    Posterior,
    Times,
    gradients,
    random_cases,
)

from fastdistill.diffusion import EDM, VP, EDMPreconditioning, Epsilon, Flow, RectifiedFlow
from fastdistill.diffusion.clocks import LinearFlow, TrigFlow
from fastdistill.models import Denoiser
from fastdistill.models.digits import DigitsNetwork
from fastdistill.objectives import (
    ContinuousConsistency,
    ContinuousConsistencyMethod,
    MeanFlow,
    MeanFlowMethod,
)
from fastdistill.objectives.trajectories import check_derivative, velocity, velocity_derivative

LAW = Times((0.1, 10.0))
BOTH = ["forward_mode", "finite_differences"]


def tangents(source="teacher", **options) -> ContinuousConsistencyMethod:
    given = {"student_times": (1.0,), "consistency_law": LAW, "tangent_warmup": 0} | options
    return ContinuousConsistencyMethod(name="continuous_consistency", source=source, **given)


def averages(source="teacher", **options) -> MeanFlowMethod:
    given = {"student_times": (1.0,), "time_law": LAW, "different_times": 0.75} | options
    return MeanFlowMethod(name="mean_flow", source=source, **given)


def between(network: AverageVelocity, r, y, s):
    return network.velocity(y, r, s)


def column(number) -> torch.Tensor:
    return torch.tensor([[number]], dtype=torch.float64)


@pytest.mark.parametrize("clock", [TrigFlow(0.7), LinearFlow()])
def test_a_clock_is_a_curve_with_its_velocity(clock):
    """y of one pair moves by V in its time, D comes back from y and V, and rate is dtime / dln."""
    x_0, eps = column(0.4), column(-1.3)

    def at(log_ratio):
        ratio = log_ratio.exp()
        moment = clock.at(ratio)
        return moment, moment.scale * (x_0 + ratio * eps)

    log_ratio, h = column(0.3), 1e-5
    moment, y = at(log_ratio)
    (ahead, y_ahead), (behind, y_behind) = at(log_ratio + h), at(log_ratio - h)
    velocity_of_pair = (moment.skip * y - x_0) / moment.out
    torch.testing.assert_close((ahead.time - behind.time) / (2 * h), moment.rate)
    torch.testing.assert_close((y_ahead - y_behind) / (2 * h), moment.rate * velocity_of_pair)


def test_trigflows_time_is_atan2_of_the_process():
    for process, t in ((EDM(), 0.8), (VP.dit(), 300.0), (RectifiedFlow(), 0.3)):
        alpha, sigma = process.alpha_sigma(column(t))
        moment = TrigFlow(0.5).at(sigma / alpha)
        torch.testing.assert_close(moment.time, torch.atan2(sigma, 0.5 * alpha))


@pytest.mark.parametrize("derivative", BOTH)
def test_the_consistency_function_of_a_gaussian_has_no_tangent(derivative):
    for case in random_cases():
        settings = tangents(derivative=derivative)
        student = case.denoiser(ConsistencyFunction)
        made = ContinuousConsistency(student, case.denoiser(Posterior), settings)
        student.requires_grad_(True)
        at = case.batch()
        update = made.student_update(at, made.generate(at))
        update.backward()
        bound = 1e-9 if derivative == "forward_mode" else 1e-3
        assert update.metrics["tangent"].max() < bound
        assert update.metrics["loss"].max() < bound
        assert max(map(abs, gradients(student))) < bound


def test_on_data_the_tangent_of_a_gaussian_vanishes_on_average():
    """One pair's velocity is the ODE's on average, so the mean gradient is 0 where f is right."""
    for case in random_cases():
        found = {}
        for variance in (case.variance, 0.5 * case.variance):
            student = case.denoiser(ConsistencyFunction, variance=variance)
            # an offset that drowns the norm leaves the tangent as it is, but for a factor
            settings = tangents("data", tangent_offset=1e6)
            made = ContinuousConsistency(student, student, settings)
            student.requires_grad_(True)
            at = case.batch(100_000)
            made.student_update(at, at.real).backward()
            found[variance] = [1e6 * value for value in gradients(student)]
        right, wrong = found.values()
        assert max(map(abs, right)) < 0.05
        assert abs(wrong[1]) > 5 * max(map(abs, right))


@pytest.mark.parametrize("warmth", [0.0, 0.5, 1.0])
def test_scms_gradient_of_mean_and_variance_is_autograds(warmth):
    """||F - F^- - g / (||g|| + c)||^2 / elements, with g by autograd of f along the path."""
    for case in random_cases():
        student = case.denoiser(ConsistencyFunction, case.mean + 0.4, 0.6)
        settings = tangents("data", tangent_warmup=10)
        made = ContinuousConsistency(student, student, settings)
        made.before_step(round(10 * warmth))
        student.requires_grad_(True)
        at = case.batch(16)
        made.student_update(at, at.real).backward()
        found = gradients(student)

        t = LAW.sample(case.process, at.noise, "consistency-t", at.index)
        alpha, sigma = case.process.alpha_sigma(t)
        ratio = (sigma / alpha).view(-1, 1)
        z = 0.5 * at.noise.normal("consistency-noise", at.index, SHAPE, torch.float64)
        tau = (ratio / 0.5).atan()

        def raw(y, tau, network=student.network):  # sigma_data F
            denoised = network.denoised(y / tau.cos(), 0.5 * tau.tan())
            return (tau.cos() * y - denoised) / tau.sin()

        y, dy = tau.cos() * at.real + tau.sin() * z, tau.cos() * z - tau.sin() * at.real
        _, change = torch.autograd.functional.jvp(raw, (y, tau), (dy, torch.ones_like(tau)))
        now = raw(y, tau)
        g = -(tau.cos() ** 2) * (now - dy) - warmth * tau.cos() * tau.sin() * (y + change)
        g = (g / (g.norm(dim=1, keepdim=True) + 0.1)).detach()
        residual = (now - now.detach()) / 0.5 - g
        (residual.square().sum(1) / SHAPE[0]).mean().backward()
        assert found == pytest.approx(gradients(student), rel=1e-5)


def test_the_average_velocity_has_its_published_numbers():
    """mean 0.4, variance 0.7, y = 0.9, s = 0.8, r = 0.25: u = -0.141243, v = 0.410180."""
    case = Case(RectifiedFlow(), 0.4, 0.7)
    student, teacher = case.denoiser(AverageVelocity), case.denoiser(Posterior)
    y, s, r = column(0.9), column(0.8)[0], column(0.25)[0]
    log_ratio = (s / (1 - s)).log()
    u = velocity(student, LinearFlow(), y, log_ratio, None, r)
    v = velocity(teacher, LinearFlow(), y, log_ratio, None)
    assert (u.item(), v.item()) == pytest.approx((-0.141243, 0.410180), abs=1e-6)
    assert velocity(student, LinearFlow(), y, log_ratio, None, s).item() == pytest.approx(v.item())
    change = velocity_derivative(student, LinearFlow(), y, log_ratio, 0.8 * 0.2 * v, None, r)
    assert (u + (s - r) * change / (0.8 * 0.2)).item() == pytest.approx(v.item(), abs=1e-9)


@pytest.mark.parametrize("derivative", BOTH)
def test_the_average_velocity_of_a_gaussian_has_no_loss(derivative):
    for case in random_cases():
        student = case.denoiser(AverageVelocity)
        settings = averages(derivative=derivative)
        made = MeanFlow(student, case.denoiser(Posterior), settings)
        student.requires_grad_(True)
        at = case.batch()
        update = made.student_update(at, made.generate(at))
        update.backward()
        bound = 1e-9 if derivative == "forward_mode" else 1e-3
        assert update.metrics["error"].max() < bound
        assert max(map(abs, gradients(student))) < bound


def test_mean_flows_gradient_of_mean_and_variance_is_autograds():
    """||u - sg[v - (s - r) du/ds]||^2 / sg(||.||^2 + c)^p, du/ds by autograd."""
    for case in random_cases():
        student = case.denoiser(AverageVelocity, case.mean + 0.4, 0.6)
        settings = averages("data", adaptive_power=0.5, adaptive_offset=0.1)
        made = MeanFlow(student, student, settings)
        student.requires_grad_(True)
        at = case.batch(16)
        update = made.student_update(at, at.real)
        update.backward()
        found = gradients(student)

        streams = ("mean-flow-1", "mean-flow-2")
        drawn = [LAW.sample(case.process, at.noise, name, at.index) for name in streams]
        alpha, sigma = case.process.alpha_sigma(torch.stack(drawn))
        low, s = (sigma / (alpha + sigma)).sort(dim=0).values.unsqueeze(-1)
        different = at.noise.uniform("mean-flow-different", at.index) < 0.75
        assert 0.5 < different.double().mean() < 1
        r = torch.where(different.view(-1, 1), low, s)
        eps = at.noise.normal("mean-flow-noise", at.index, SHAPE, torch.float64)
        y, v = (1 - s) * at.real + s * eps, eps - at.real
        average = functools.partial(between, student.network, r)
        _, change = torch.autograd.functional.jvp(average, (y, s), (v, torch.ones_like(s)))
        live = average(y, s)
        aim = torch.where(different.view(-1, 1), v - (s - r) * change, v)
        error = (live - aim.detach()).square().sum(1)
        (error / (error.detach() + 0.1) ** 0.5).mean().backward()
        assert found == pytest.approx(gradients(student), rel=1e-5)
        torch.testing.assert_close(update.metrics["error"], error.detach(), rtol=1e-5, atol=1e-8)


def test_one_step_of_an_average_velocity_is_the_odes_solution():
    """The student as it is sampled, told nothing of a second time, leads to r = 0."""
    for case in random_cases():
        student, other = case.denoiser(AverageVelocity), case.denoiser(ConsistencyFunction)
        t = case.process.time_of_ratio(torch.full((5,), 4.0, dtype=torch.float64))
        x_t = torch.randn(5, *SHAPE, dtype=torch.float64)
        torch.testing.assert_close(student(x_t, t), other(x_t, t))


def digits_denoiser(process, parametrisation, two_times=False) -> Denoiser:
    torch.manual_seed(0)
    network = DigitsNetwork(width=32, blocks=2)
    torch.nn.init.normal_(network.leave[1].weight, std=0.2)
    made = Denoiser(network, process, parametrisation)
    if two_times:
        made.add_second_time()
        torch.nn.init.normal_(network.second.weight, std=0.2)
    return made.double()


@pytest.mark.parametrize("clock", [TrigFlow(0.5), LinearFlow()])
@pytest.mark.parametrize("two_times", [False, True])
@pytest.mark.parametrize(
    ("process", "parametrisation"),
    [
        (EDM(), EDMPreconditioning()),
        (VP.cosine(50), Epsilon(time_scale=0.02)),
        (RectifiedFlow(), Flow()),
    ],
)
def test_forward_mode_equals_finite_differences_of_a_network(
    process, parametrisation, two_times, clock
):
    denoiser = digits_denoiser(process, parametrisation, two_times)
    y, slope = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    log_ratio = torch.tensor([-1.03, 0.11, 0.87], dtype=torch.float64)
    until = torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64)
    given = (denoiser, clock, y, log_ratio, slope, torch.tensor([1, 2, 3]), until)
    exact = velocity_derivative(*given)
    near = velocity_derivative(*given, derivative="finite_differences", step=1e-5)
    torch.testing.assert_close(near, exact, rtol=1e-6, atol=1e-6)
    coarse = velocity_derivative(*given, derivative="finite_differences", step=2e-2)
    assert 0 < (coarse - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_second_time_changes_no_answer_before_it_is_trained():
    denoiser = digits_denoiser(EDM(), EDMPreconditioning())
    x_t, t = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    labels = torch.arange(4)
    before = denoiser(x_t, t, labels)
    denoiser.add_second_time()
    assert denoiser.two_times
    for until in (None, torch.zeros(4).double(), torch.full((4,), 0.3).double()):
        assert torch.equal(denoiser(x_t, t, labels, until), before)
    torch.nn.init.normal_(denoiser.network.second.weight)
    assert not torch.equal(denoiser(x_t, t, labels), before)
    weights = denoiser.network.second.weight.clone()
    denoiser.add_second_time()  # it has one
    assert torch.equal(denoiser.network.second.weight, weights)


def test_a_network_without_a_second_time_is_refused():
    denoiser = Denoiser(torch.nn.Linear(1, 1), EDM(), EDMPreconditioning())
    with pytest.raises(ValueError, match="Linear has no second time, which mean_flow tells its"):
        denoiser.add_second_time()
    with pytest.raises(ValueError, match="the student has one time; call add_second_time"):
        MeanFlow(denoiser, denoiser, averages())


def test_a_layer_without_forward_mode_is_named():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Network(torch.nn.Linear):
        def forward(self, x, t, condition):
            return super().forward(Opaque.apply(x))

    denoiser = Denoiser(Network(3, 3), EDM(), EDMPreconditioning())
    given = (denoiser, TrigFlow(), torch.ones(2, 3), torch.zeros(2), torch.ones(2, 3), None)
    with pytest.raises(ValueError, match="a layer of Network has no forward-mode derivative"):
        velocity_derivative(*given)
    assert velocity_derivative(*given, derivative="finite_differences").isfinite().all()


def test_finite_differences_of_bfloat16_networks_are_refused():
    check_derivative("forward_mode", "bfloat16")
    check_derivative("finite_differences", "float32")
    with pytest.raises(ValueError, match="networks in bfloat16 round away what differs"):
        check_derivative("finite_differences", "bfloat16")


def test_the_tangents_unstable_part_grows_in():
    case = next(random_cases())
    student = case.denoiser(ConsistencyFunction)
    made = ContinuousConsistency(student, student, tangents(tangent_warmup=10_000))
    for step, expected in ((0, 0.0), (2500, 0.25), (20_000, 1.0)):
        made.before_step(step)
        assert float(made.warmth) == expected
    assert "warmth" not in made.state_dict()  # it follows the step
    assert math.isclose(float(ContinuousConsistency(student, student, tangents()).warmth), 1.0)
