"""diffusers' schedulers compute what the students' own sampler computes, noise by noise."""

from __future__ import annotations

import diffusers
import pytest
import torch

from fastdistill.diffusion import (
    EDM,
    VP,
    X0,
    EDMPreconditioning,
    Epsilon,
    Flow,
    Noise,
    RectifiedFlow,
    V,
    few_step,
)
from fastdistill.engine.stock_sampler import stock_sampler
from fastdistill.models import Denoiser

SHAPE = (3, 8, 8)
STREAMS = "latents", "renoise-1", "renoise-2", "renoise-3"
CASES = [
    (VP.stable_diffusion(), Epsilon(), [399.0]),
    (VP.stable_diffusion(), Epsilon(), [999.0]),
    (VP.stable_diffusion(), V(), [999.0, 749.0, 499.0, 249.0]),
    (VP.stable_diffusion(), Epsilon(), [799.0, 599.0, 399.0, 199.0]),
    (VP.dit(), Epsilon(), [999.0, 600.0, 17.0]),
    (VP.dit(), X0(), [640.0, 3.0]),
    (VP.dit(), V(), [1.0]),
    (VP.cosine(), V(), [999.0, 500.0]),
    (VP.cosine(), X0(), [700.0]),
    (VP.dit(), Epsilon(), [439.82]),
    (VP.stable_diffusion(), V(), [399.5]),
    (VP.stable_diffusion(), X0(), [12.25]),
    (RectifiedFlow(3.0), Flow(1000.0), [1.0]),
    (RectifiedFlow(3.0), Flow(1000.0), [0.97]),
    (RectifiedFlow(), Flow(1000.0), [1.0, 0.9, 0.75, 0.5]),
    (EDM(), EDMPreconditioning(), [2.5]),
    (EDM(), EDMPreconditioning(sigma_data=1.0), [80.0]),
]


class Wave(torch.nn.Module):
    """A network whose output depends on everything that it is told."""

    def forward(self, model_input, noise_condition, condition):
        level = noise_condition.reshape(-1, 1, 1, 1)
        return torch.sin(3 * model_input) + 0.3 * torch.cos(level) + 0.1 * model_input


def sampled_by_diffusers(sampler, network, noises):
    """The loop of a diffusers pipeline, with given noise."""
    scheduler = getattr(diffusers, sampler.scheduler).from_config(sampler.config)
    if sampler.schedule:
        scheduler.set_timesteps(**sampler.schedule)
    else:
        scheduler.set_timesteps(sampler.steps)
    assert len(scheduler.timesteps) == sampler.steps
    x = noises[0] * sampler.start
    for k, t in enumerate(scheduler.timesteps):
        model_input = x
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(x, t)
        raw = network(model_input, t.expand(len(x)), None)
        # What the last step draws does not matter.
        after = noises[k + 1] if k + 1 < len(noises) else torch.full_like(x, 7.0)
        with pytest.MonkeyPatch.context() as patch:
            module = type(scheduler).__module__
            patch.setattr(f"{module}.randn_tensor", lambda *_, noise=after, **__: noise)
            x = scheduler.step(raw, t, x).prev_sample
    return x


@pytest.mark.parametrize(("process", "parametrisation", "times"), CASES)
def test_the_scheduler_gives_the_students_samples(process, parametrisation, times):
    student = Denoiser(Wave(), process, parametrisation)
    noise, index = Noise(5), torch.arange(4)
    expected = few_step(student, process, times, noise, index, SHAPE)
    drawn = [noise.normal(stream, index, SHAPE) for stream in STREAMS[: len(times)]]
    sampler = stock_sampler(process, parametrisation, times)
    found = sampled_by_diffusers(sampler, student.network, drawn)
    # Rounding of x0 = (x - sigma F) / alpha, alpha being 0.006 at DiT's t = 999.
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("process", "parametrisation", "times"), CASES)
def test_a_pipelines_own_start_is_known(process, parametrisation, times):
    sampler = stock_sampler(process, parametrisation, times)
    scheduler = getattr(diffusers, sampler.scheduler).from_config(sampler.config)
    if sampler.scheduler == "EulerDiscreteScheduler":  # the others' do not depend on the steps
        scheduler.set_timesteps(sampler.steps)
    own = float(getattr(scheduler, "init_noise_sigma", 1.0))
    assert own == pytest.approx(sampler.own_start)
    assert sampler.starts_itself == (abs(own - sampler.start) < 1e-6)


@pytest.mark.parametrize("times", [[399.0], [999.0, 749.0, 499.0, 249.0], [799.0, 399.0]])
def test_students_of_equal_steps_need_the_number_of_steps_alone(times):
    assert stock_sampler(VP.stable_diffusion(), Epsilon(), times).schedule == {}


WRONG = [
    (VP.dit(), Epsilon(), [], "one or more"),
    (VP.dit(), Epsilon(), [249.0, 499.0], "from the noisiest on"),
    (VP.dit(), Epsilon(), [600.0, 399.5], "whole timesteps from 1 to 999, and others for a single"),
    (VP.dit(), Epsilon(), [1000.0], "from 1 to 999"),
    (VP.dit(), Epsilon(), [400.0, 0.0], "from 1 to 999"),
    (VP.dit(), Epsilon(2.0), [400.0], "told t times 2.0"),
    (VP.dit(), EDMPreconditioning(), [400.0], "predicts EDMPreconditioning on process VP"),
    (RectifiedFlow(), Flow(), [1.0], "told t times 1.0"),
    (RectifiedFlow(), Epsilon(), [1.0], "predicts Epsilon on process RectifiedFlow"),
    (EDM(), EDMPreconditioning(), [80.0, 1.0], "only one-step students"),
]


@pytest.mark.parametrize(("process", "parametrisation", "times", "sentence"), WRONG)
def test_what_no_scheduler_computes_is_refused(process, parametrisation, times, sentence):
    with pytest.raises(ValueError, match=sentence):
        stock_sampler(process, parametrisation, times)
