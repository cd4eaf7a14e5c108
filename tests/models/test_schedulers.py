"""Denoisers of pretrained models: what diffusers' schedulers and pipelines compute, to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tiny_models import FAMILIES, condition_of, scheduler, tiny_adapter, tiny_denoiser, tiny_model
from torch import Tensor

from fastdistill.diffusion import EDM, VP, X0, EDMPreconditioning, Epsilon, Flow, RectifiedFlow, V
from fastdistill.models import Denoiser
from fastdistill.models.adapters import adapt
from fastdistill.models.pretrained import parametrisation_of, process_of

TIMESTEPS = [0, 1, 20, 399, 750, 979, 999]
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def config_of(value: Any) -> dict[str, Any]:
    return json.loads(value.to_json_string())


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within a tolerance relative to the largest number of a tensor."""
    assert found.shape == expected.shape
    assert torch.isfinite(expected).all()
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize(
    ("config", "process"),
    [
        ({}, VP.dit()),
        (STABLE_DIFFUSION, VP.stable_diffusion()),
        (COSINE, VP.cosine()),
        ({"num_train_timesteps": 250}, VP(1e-4, 2e-2, "linear", 250)),
    ],
)
def test_a_vp_schedulers_table_is_that_of_its_process(config, process):
    theirs = diffusers.DDPMScheduler(**config)
    found = process_of(config_of(theirs))
    assert found == process
    alpha, sigma = found.alpha_sigma(torch.arange(found.steps, dtype=torch.float64))
    betas = theirs.betas.double()
    close(alpha.square(), torch.cumprod(1 - betas, 0), 1e-6)
    assert (sigma.square() / -torch.expm1(torch.log1p(-betas).cumsum(0)) - 1).abs().max() < 1e-5


VP_SCHEDULERS = {
    "DDIM": lambda s, raw, t, x: s.step(raw, t, x).pred_original_sample,
    "DDPM": lambda s, raw, t, x: s.step(raw, t, x).pred_original_sample,
    "EulerDiscrete": lambda s, raw, t, x: s.step(raw, t, x).pred_original_sample,
    "EulerAncestralDiscrete": lambda s, raw, t, x: s.step(raw, t, x).pred_original_sample,
    "DPMSolverMultistep": lambda s, raw, t, x: s.convert_model_output(raw, sample=x),
    "UniPCMultistep": lambda s, raw, t, x: s.convert_model_output(raw, sample=x),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_vp_denoisers_are_the_schedulers_own_estimate_of_x0(name, prediction):
    if (name, prediction) in {("EulerDiscrete", "sample"), ("EulerAncestralDiscrete", "sample")}:
        pytest.skip("diffusers' Euler schedulers do not take it")
    options = STABLE_DIFFUSION | {"prediction_type": prediction}
    options |= {"clip_sample": False} if name in ("DDIM", "DDPM") else {}
    theirs = getattr(diffusers, f"{name}Scheduler")(**options)
    network = tiny_adapter("sd15")
    config = config_of(network.model)
    denoiser = Denoiser(
        network, process_of(config_of(theirs)), parametrisation_of(config_of(theirs), config)
    )
    kind = {"epsilon": Epsilon(), "v_prediction": V(), "sample": X0()}[prediction]
    assert denoiser.parametrisation == kind
    condition = condition_of(network, 1)
    x_t = torch.randn(1, *network.sample_shape, generator=torch.Generator().manual_seed(0))
    solver = name in ("DPMSolverMultistep", "UniPCMultistep")  # these end before 0
    for t in TIMESTEPS[solver:]:
        theirs.set_timesteps(1000)
        index = theirs.timesteps.tolist().index(t)
        theirs._step_index = index
        in_edm_variables = name.startswith("Euler")
        alpha = denoiser.process.alpha_sigma(torch.tensor([float(t)])).alpha
        sample = x_t / alpha if in_edm_variables else x_t
        read = theirs.scale_model_input(sample, theirs.timesteps[index])
        with torch.no_grad():
            raw = network.model(read, theirs.timesteps[index], **condition).sample
            expected = VP_SCHEDULERS[name](theirs, raw, theirs.timesteps[index], sample)
            close(denoiser(x_t, torch.tensor([float(t)]), condition), expected, 5e-5)


def test_in_float64_only_the_rounding_of_diffusers_betas_is_left():
    theirs = diffusers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False)
    ends = 0.00085**0.5, 0.012**0.5
    betas = torch.linspace(*ends, 1000, dtype=torch.float64).square()
    theirs.alphas_cumprod = torch.cumprod(1 - betas, 0)
    theirs.set_timesteps(1000)
    denoiser = tiny_denoiser("sd15").double()
    condition = {k: v.double() for k, v in condition_of(denoiser.network, 1).items()}
    x_t = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    for t in TIMESTEPS:
        time = torch.tensor([t], dtype=torch.float64)
        with torch.no_grad():
            raw = denoiser.network.model(x_t, time, **condition).sample
            expected = theirs.step(raw, t, x_t).pred_original_sample
            close(denoiser(x_t, time, condition), expected, 1e-11)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_denoisers_are_the_schedulers_own(name):
    theirs = getattr(diffusers, name)(sigma_data=0.7, sigma_max=60.0)
    network = tiny_adapter("unet")
    config = config_of(network.model)
    denoiser = Denoiser(
        network, process_of(config_of(theirs)), parametrisation_of(config_of(theirs), config)
    )
    assert denoiser.process == EDM(sigma_max=60.0)
    assert denoiser.parametrisation == EDMPreconditioning(0.7)
    theirs.set_timesteps(9)
    noise = torch.randn(1, 3, 16, 16)
    for k, t in enumerate(theirs.timesteps):
        theirs._step_index, theirs.is_scale_input_called = k, False
        sigma = theirs.sigmas[k]
        with torch.no_grad():
            raw = network.model(theirs.scale_model_input(noise * sigma, t), t).sample
            expected = theirs.precondition_outputs(noise * sigma, raw, sigma)
            close(denoiser(noise * sigma, sigma[None]), expected, 1e-5)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_flow_denoisers_are_x_minus_sigma_velocity(family):
    theirs, denoiser = scheduler(family), tiny_denoiser(family)
    assert isinstance(denoiser.parametrisation, Flow)
    network = denoiser.network
    assert network.tokens == 16
    mu = {"mu": 0.5 + 0.65 * (16 - 256) / (4096 - 256)} if family == "flux" else {}
    theirs.set_timesteps(7, **mu)
    condition = condition_of(network, 1)
    x_t = torch.randn(1, *network.sample_shape)
    for k, t in enumerate(theirs.timesteps):
        with torch.no_grad():
            velocity = network(x_t, t[None], condition)
            expected = x_t - theirs.sigmas[k] * velocity
            close(denoiser(x_t, theirs.sigmas[k][None], condition), expected, 1e-5)
            theirs._step_index = k
            stepped = theirs.step(velocity, t, x_t).prev_sample
            ratio = theirs.sigmas[k + 1] / theirs.sigmas[k]
            close(expected + ratio * (x_t - expected), stepped, 1e-5)


def test_a_flows_grid_has_the_schedulers_shift():
    for family in ("sd3", "flux"):
        theirs, process = scheduler(family), tiny_denoiser(family).process
        mu = {"mu": 0.5 + 0.65 * (16 - 256) / (4096 - 256)} if family == "flux" else {}
        theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.1], **mu)
        close(
            process.time_of_position(torch.tensor([1.0, 0.75, 0.5, 0.1])), theirs.sigmas[:-1], 1e-6
        )
    linear = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**linear)
    theirs.set_timesteps(sigmas=[1.0, 0.5], mu=1.15)
    process = process_of(config_of(theirs), tokens=4096)
    close(process.time_of_position(torch.tensor([1.0, 0.5])), theirs.sigmas[:-1], 1e-6)


def test_solvers_with_flow_sigmas_are_flows():
    theirs = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    assert process_of(config_of(theirs)) == RectifiedFlow(3.0)
    assert parametrisation_of(config_of(theirs), {}) == Flow(1000.0)


# Whole pipelines with guidance, against the guided denoiser in DDIM's or Euler's step.


def sampled(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    condition: Any,
    null: Any = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """The probability flow from the first time to the last, ending at the last estimate of x0."""
    levels = [denoiser.process.alpha_sigma(t) for t in times]
    for k, t in enumerate(times):
        alpha, sigma = levels[k]
        time = t.expand(len(x))
        denoised = denoiser(x, time, condition)
        if null is not None:
            unguided = denoiser(x, time, null)
            denoised = unguided + guidance_scale * (denoised - unguided)
        if k + 1 == len(times):
            return denoised
        next_alpha, next_sigma = levels[k + 1]
        x = next_alpha * denoised + next_sigma / sigma * (x - alpha * denoised)
    raise AssertionError


class Latents(torch.nn.Module):
    """In a VAE's place: its images are the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.config = diffusers.configuration_utils.FrozenDict(
            scaling_factor=1.0, shift_factor=0.0, block_out_channels=[1] * 4, latent_channels=4
        )
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def decode(self, latents: Tensor, **_: Any) -> Any:
        return diffusers.models.autoencoders.vae.DecoderOutput(sample=latents)


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=True)


def with_scheduler(model: Any, theirs: Any) -> Denoiser:
    network = adapt(model, None, 8 if "Flux" in type(model).__name__ else None)
    process = process_of(config_of(theirs), network.tokens)
    parametrisation = parametrisation_of(config_of(theirs), config_of(model))
    return Denoiser(network, process, parametrisation).requires_grad_(False).eval()


def start(denoiser: Denoiser) -> Tensor:
    return torch.randn(
        2, *denoiser.network.sample_shape, generator=torch.Generator().manual_seed(7)
    )


def pipeline_sd15() -> tuple[Tensor, Tensor]:
    theirs = ddim(**STABLE_DIFFUSION)
    denoiser = with_scheduler(tiny_model("sd15"), theirs)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=denoiser.network.model, scheduler=theirs,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    text, null = (condition_of(denoiser.network, seed=seed) for seed in (1, 2))
    expected = quiet(pipeline)(
        prompt_embeds=text["encoder_hidden_states"],
        negative_prompt_embeds=null["encoder_hidden_states"],
        latents=start(denoiser), guidance_scale=5.0, num_inference_steps=4, output_type="latent",
    ).images  # fmt: skip
    return sampled(denoiser, start(denoiser), theirs.timesteps.float(), text, null, 5.0), expected


def pipeline_sdxl() -> tuple[Tensor, Tensor]:
    theirs = diffusers.EulerDiscreteScheduler(
        **STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1
    )
    denoiser = with_scheduler(tiny_model("sdxl"), theirs)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=denoiser.network.model, scheduler=theirs, add_watermarker=False,
    )  # fmt: skip
    condition = condition_of(denoiser.network)
    condition["time_ids"] = torch.tensor([120.0, 110, 3, 4, 128, 128]).repeat(2, 1)
    null = denoiser.network.null_condition(condition)
    expected = quiet(pipeline)(
        prompt_embeds=condition["encoder_hidden_states"],
        pooled_prompt_embeds=condition["text_embeds"],
        negative_prompt_embeds=null["encoder_hidden_states"],
        negative_pooled_prompt_embeds=null["text_embeds"],
        original_size=(120, 110), crops_coords_top_left=(3, 4), target_size=(128, 128),
        latents=start(denoiser), guidance_scale=7.5, num_inference_steps=4, output_type="latent",
    ).images  # fmt: skip
    # Euler's start is x_t / alpha for a little more than unit noise.
    times = theirs.timesteps.float()
    x = start(denoiser) * theirs.init_noise_sigma * denoiser.process.alpha_sigma(times[0]).alpha
    return sampled(denoiser, x, times, condition, null, 7.5), expected


def pipeline_dit() -> tuple[Tensor, Tensor]:
    theirs = ddim()
    denoiser = with_scheduler(tiny_model("dit", num_embeds_ada_norm=1000), theirs)
    pipeline = quiet(diffusers.DiTPipeline(denoiser.network.model, Latents(), theirs))
    kept = {}

    def decode(latents: Tensor) -> Any:
        kept["latents"] = latents
        return diffusers.models.autoencoders.vae.DecoderOutput(sample=latents[:, :3])

    pipeline.vae.decode = decode
    labels = torch.tensor([3, 999])
    generator = torch.Generator().manual_seed(7)
    pipeline(labels.tolist(), guidance_scale=4.0, num_inference_steps=4, generator=generator)
    null = denoiser.network.null_condition(labels)
    found = sampled(denoiser, start(denoiser), theirs.timesteps.float(), labels, null, 4.0)
    return found, kept["latents"]


def pipeline_pixart(size: int = 8, patch: int = 2) -> tuple[Tensor, Tensor]:
    theirs = diffusers.DPMSolverMultistepScheduler(solver_order=1)
    family = "pixart" if size == 8 else "pixart_sized"
    model = tiny_model(family, sample_size=size, patch_size=patch)
    denoiser = with_scheduler(model, theirs)
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=Latents(), transformer=model, scheduler=theirs
    )
    condition, null = (condition_of(denoiser.network, seed=seed) for seed in (1, 2))
    for one in (condition, null):
        if size == 128:
            one["resolution"] = torch.tensor([[1024.0, 1024.0]]).repeat(2, 1)
            one["aspect_ratio"] = torch.ones(2, 1)
    null["encoder_attention_mask"] = torch.ones_like(null["encoder_attention_mask"])
    expected = quiet(pipeline)(
        negative_prompt=None,
        prompt_embeds=condition["encoder_hidden_states"],
        prompt_attention_mask=condition["encoder_attention_mask"],
        negative_prompt_embeds=null["encoder_hidden_states"],
        negative_prompt_attention_mask=null["encoder_attention_mask"],
        height=8 * size, width=8 * size, use_resolution_binning=False, latents=start(denoiser),
        guidance_scale=4.5, num_inference_steps=4, output_type="latent",
    ).images  # fmt: skip
    times = theirs.timesteps.float()
    return sampled(denoiser, start(denoiser), times, condition, null, 4.5), expected


def pipeline_sd3() -> tuple[Tensor, Tensor]:
    theirs = scheduler("sd3")
    denoiser = with_scheduler(tiny_model("sd3"), theirs)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=denoiser.network.model, scheduler=theirs, vae=Latents(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    text, null = (condition_of(denoiser.network, seed=seed) for seed in (1, 2))
    expected = quiet(pipeline)(
        prompt_embeds=text["encoder_hidden_states"],
        pooled_prompt_embeds=text["pooled_projections"],
        negative_prompt_embeds=null["encoder_hidden_states"],
        negative_pooled_prompt_embeds=null["pooled_projections"],
        height=64, width=64, latents=start(denoiser), guidance_scale=7.0, num_inference_steps=4,
        output_type="latent",
    ).images  # fmt: skip
    return sampled(denoiser, start(denoiser), theirs.sigmas[:-1], text, null, 7.0), expected


def pipeline_flux() -> tuple[Tensor, Tensor]:
    theirs = scheduler("flux")
    denoiser = with_scheduler(tiny_model("flux"), theirs)
    pipeline = diffusers.FluxPipeline(
        scheduler=theirs, vae=Latents(), text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=denoiser.network.model,
    )  # fmt: skip
    condition, x = condition_of(denoiser.network), start(denoiser)
    packed = quiet(pipeline)(
        prompt_embeds=condition["encoder_hidden_states"],
        pooled_prompt_embeds=condition["pooled_projections"], guidance_scale=3.5,
        latents=pipeline._pack_latents(x, 2, 4, 8, 8), height=64, width=64, num_inference_steps=4,
        output_type="latent",
    ).images  # fmt: skip
    expected = pipeline._unpack_latents(packed, 64, 64, 8)
    return sampled(denoiser, x, theirs.sigmas[:-1], condition), expected


def pipeline_unet() -> tuple[Tensor, Tensor]:
    theirs = ddim()
    denoiser = with_scheduler(tiny_model("unet"), theirs)
    pipeline = quiet(diffusers.DDIMPipeline(denoiser.network.model, theirs))
    made = pipeline(
        batch_size=2, generator=torch.Generator().manual_seed(7), num_inference_steps=4,
        output_type="np",
    ).images  # fmt: skip
    times = pipeline.scheduler.timesteps.float()  # it made its own of the configuration
    found = sampled(denoiser, start(denoiser), times, None)
    return (found / 2 + 0.5).clamp(0, 1), torch.from_numpy(made).permute(0, 3, 1, 2)


PIPELINES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "sd15": pipeline_sd15,
    "sdxl": pipeline_sdxl,
    "unet": pipeline_unet,
    "dit": pipeline_dit,
    "pixart": pipeline_pixart,
    "pixart_sized": lambda: pipeline_pixart(128, 8),
    "sd3": pipeline_sd3,
    "flux": pipeline_flux,
}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_pipeline_with_guidance_is_the_denoiser_sampled(family):
    with torch.no_grad():
        found, expected = PIPELINES[family]()
    close(found, expected, 1e-4)
