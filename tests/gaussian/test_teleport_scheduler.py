"""`TeleportScheduler` around diffusers' own schedulers, in their own variables and pipelines."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from test_gaussian_model import some_gaussian, some_mixture

from fastdistill.diffusion import EDM, deterministic, heun, karras_sigmas
from fastdistill.gaussian import Gaussian, TeleportScheduler

VP_SCHEDULERS = {
    "EulerDiscreteScheduler": {},
    "EulerDiscreteScheduler-karras": {"use_karras_sigmas": True},
    "EulerDiscreteScheduler-v": {"prediction_type": "v_prediction"},
    "HeunDiscreteScheduler": {"use_karras_sigmas": True},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "DPMSolverMultistepScheduler-3": {"solver_order": 3},
    "DPMSolverMultistepScheduler-flow": {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
    },
    "UniPCMultistepScheduler": {},
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False},
    "DDIMScheduler-trailing": {
        "clip_sample": False,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "EDMEulerScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
}


def make(name):
    return getattr(diffusers, name.split("-")[0])(**VP_SCHEDULERS[name])


def level(scheduler, t):
    """(alpha, sigma, what the network reads divided by x_t) at the coming step, by its name."""
    name = type(scheduler).__name__
    if name == "DDIMScheduler":
        bar = float(scheduler.alphas_cumprod[int(t)])
        return bar**0.5, (1 - bar) ** 0.5, 1.0
    index = scheduler.step_index if scheduler.step_index is not None else scheduler.begin_index
    sigma = float(scheduler.sigmas[index or 0])
    if name.startswith(("Euler", "Heun")):
        return 1.0, sigma, (sigma**2 + 1) ** -0.5
    if name.startswith("EDM"):
        return 1.0, sigma, (sigma**2 + 0.25) ** -0.5
    if name.startswith("Flow") or scheduler.config.get("use_flow_sigmas"):
        return 1 - sigma, sigma, 1.0
    alpha = (sigma**2 + 1) ** -0.5
    return alpha, sigma * alpha, 1.0


def network(gaussian, scheduler, model_input, t):
    """The raw output of a network that has learned the Gaussian, as the scheduler wants it."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    alpha, sigma, scale = level(scheduler, t)
    x = model_input / scale
    denoised = gaussian.denoise(x, alpha, sigma)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if type(scheduler).__name__.startswith("EDM"):
        total = sigma**2 + 0.25
        return (denoised - 0.25 / total * x) / (sigma * 0.5 * total**-0.5)
    if kind == "v_prediction":
        if type(scheduler).__name__.startswith("Euler"):
            norm = (sigma**2 + 1) ** 0.5
            return (x / norm**2 - denoised) * norm / sigma
        return (alpha * x - denoised) / sigma
    eps = (x - alpha * denoised) / sigma
    return eps - denoised if kind == "flow_prediction" else eps


def sample(scheduler, gaussian, steps, z, calls=None):
    """What every stock pipeline does."""
    scheduler.set_timesteps(steps)
    x = z * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = hasattr(scheduler, "scale_model_input")
        model_input = scheduler.scale_model_input(x, t) if scaled else x
        if calls is not None:
            calls.append(float(t))
        output = network(gaussian, scheduler, model_input, t)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def start():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 1, 2, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_a_teleported_run_ends_where_the_exact_ode_ends(name):
    """As near as the whole run does, and with fewer evaluations."""
    gaussian, z, steps, skip = some_gaussian(), start(), 60, 20
    calls: list[list[float]] = [[], []]
    full_scheduler = make(name)
    full = sample(full_scheduler, gaussian, steps, z, calls[0])
    scheduler = TeleportScheduler(make(name), gaussian, skip)
    moved = sample(scheduler, gaussian, steps, z, calls[1])
    first, last = scheduler._place(full_scheduler, 0), (1.0, 1e-9)
    exact = gaussian.transport(z * getattr(full_scheduler, "init_noise_sigma", 1.0), *first, *last)
    errors = [float((x - exact).norm() / exact.norm()) for x in (full, moved)]
    assert errors[1] <= errors[0] * 1.05 + 1e-6
    assert errors[1] < 0.05
    order, spent = full_scheduler.order, int(name.startswith("Flow"))
    assert len(calls[1]) == len(calls[0]) - skip * order + spent


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_nothing_skipped_is_the_scheduler_itself(name):
    gaussian, z = some_gaussian(), start()
    wrapped = TeleportScheduler(make(name), gaussian, skip=0)
    assert torch.equal(sample(wrapped, gaussian, 12, z), sample(make(name), gaussian, 12, z))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_second_run_starts_with_an_empty_history(name):
    gaussian, z = some_gaussian(), start()
    scheduler = TeleportScheduler(make(name), gaussian, skip=5)
    first = sample(scheduler, gaussian, 15, z)
    assert torch.equal(sample(scheduler, gaussian, 15, z), first)
    scheduler.set_timesteps(15)
    assert scheduler.lower_order_nums == 0
    assert scheduler.begin_index == 5


def test_heuns_first_stage_is_the_first_evaluation():
    scheduler = TeleportScheduler(make("HeunDiscreteScheduler"), some_gaussian(), skip=3)
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 2 * 7 - 1
    assert scheduler.scheduler.state_in_first_order


def test_samples_of_classes_go_by_their_own_gaussian():
    mixture, labels = some_mixture(by_class=True), torch.arange(16) % 3
    scheduler = TeleportScheduler(make("DDIMScheduler"), mixture.given(labels), skip=4)
    scheduler.set_timesteps(10)
    z = start()
    moved = scheduler.scale_model_input(torch.cat((z, z)), scheduler.timesteps[0])
    places = [scheduler._place(scheduler.scheduler, k) for k in (0, 4)]
    for k in range(3):
        expected = mixture[k].transport(z[labels == k], *places[0], *places[1])
        torch.testing.assert_close(moved[:16][labels == k], expected)
        torch.testing.assert_close(moved[16:][labels == k], expected)


def test_a_stock_pipeline_needs_no_change(tmp_path):
    """Class-conditional DiT, guided: fewer evaluations, and the signatures that it looks at."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, out_channels=8
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, latent_channels=4
    )
    pipe = diffusers.DiTPipeline(transformer, vae, make("DPMSolverMultistepScheduler"))
    pipe.set_progress_bar_config(disable=True)
    calls = []
    transformer.register_forward_hook(lambda *_: calls.append(1))
    basis = torch.eye(256)[:, :3].contiguous()
    gaussian = Gaussian(torch.zeros(4, 8, 8), basis, torch.ones(3), 0.5)
    pipe.scheduler = TeleportScheduler(pipe.scheduler, gaussian, skip=4)
    images = pipe([1, 2], num_inference_steps=10, output_type="np").images
    assert images.shape[0] == 2
    assert len(calls) == 6
    names = inspect.signature(pipe.scheduler.set_timesteps).parameters
    assert "timesteps" in names
    assert "generator" in inspect.signature(pipe.scheduler.step).parameters


def test_a_pipeline_without_scaling_is_told_or_spends_an_evaluation():
    """DDIMPipeline shows the network its samples as they are."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    gaussian = Gaussian(torch.zeros(1, 8, 8), torch.zeros(64, 0), torch.zeros(0), 0.5)
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    pipe.scheduler = TeleportScheduler(own, gaussian, skip=3)
    with pytest.raises(ValueError, match="give TeleportScheduler spend_first=True"):
        pipe(num_inference_steps=8)
    pipe.scheduler = TeleportScheduler(own, gaussian, skip=3, spend_first=True)
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(num_inference_steps=8)
    assert len(calls) == 6


def test_what_cannot_be_teleported_is_said():
    gaussian = some_gaussian()
    with pytest.raises(ValueError, match="PNDMScheduler cannot be teleported; known are Euler"):
        TeleportScheduler(diffusers.PNDMScheduler(), gaussian, 2)
    with pytest.raises(ValueError, match="the ODE of a mixture has no closed form"):
        TeleportScheduler(make("DDIMScheduler"), some_mixture(), 2)
    with pytest.raises(ValueError, match="skip is -1"):
        TeleportScheduler(make("DDIMScheduler"), gaussian, -1)
    scheduler = TeleportScheduler(make("HeunDiscreteScheduler"), gaussian, 5)
    with pytest.raises(ValueError, match="leaves none of 5 steps"):
        scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="begins at step 4 itself"):
        scheduler.set_begin_index(4)


@pytest.mark.parametrize("sampler", [heun, deterministic])
def test_our_samplers_end_where_they_would_without_the_skipped_steps(sampler):
    gaussian, z = some_gaussian(), start()

    def denoise(x, t):
        return gaussian.denoise(x, 1.0, t)

    sigmas = karras_sigmas(40)
    full = sampler(denoise, z, EDM(), sigmas)
    moved = sampler(denoise, z, EDM(), sigmas, gaussian.teleport(15))
    exact = gaussian.transport(z * 80, 1.0, 80.0, 1.0, 1e-12)
    assert (moved - exact).norm() <= 1.01 * (full - exact).norm()
    assert (moved - exact).norm() < 0.05 * exact.norm()
