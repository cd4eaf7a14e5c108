"""`TeleportScheduler` in stock text-to-image pipelines, which run as before with fewer steps."""

from __future__ import annotations

import diffusers
import pytest
import tiny_pipelines
import torch

from fastdistill import Gaussian, TeleportScheduler


def calls_of(pipe, network, **options):
    """How often the network is asked, and the latents that come out."""
    pipe.set_progress_bar_config(disable=True)
    calls = []
    hook = network.register_forward_hook(lambda *_: calls.append(1))
    latents = pipe(
        "a cat",
        height=16,
        width=16,
        num_inference_steps=6,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images
    hook.remove()
    return len(calls), latents


def gaussian():
    return Gaussian(torch.zeros(4, 8, 8), torch.eye(256)[:, :3].contiguous(), torch.ones(3), 0.5)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_stable_diffusion_with_guidance(scheduler):
    pipe = tiny_pipelines.stable_diffusion()
    own = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.scheduler = own
    whole, _ = calls_of(pipe, pipe.unet)
    pipe.scheduler = TeleportScheduler(own, gaussian(), skip=2)
    fewer, latents = calls_of(pipe, pipe.unet)
    assert fewer == whole - 2 * own.order
    assert latents.isfinite().all()
    pipe.scheduler = TeleportScheduler(own, gaussian(), skip=0)
    same, latents = calls_of(pipe, pipe.unet)
    pipe.scheduler = own
    assert same == whole
    assert torch.equal(latents, calls_of(pipe, pipe.unet)[1])


def test_stable_diffusion_3_spends_one_evaluation():
    pipe = tiny_pipelines.stable_diffusion_3(with_t5=False)
    whole, _ = calls_of(pipe, pipe.transformer)
    pipe.scheduler = TeleportScheduler(pipe.scheduler, gaussian(), skip=3)
    fewer, latents = calls_of(pipe, pipe.transformer)
    assert (whole, fewer) == (6, 4)
    assert latents.isfinite().all()


def test_latents_in_another_shape_are_refused():
    """Flux packs its latents, so that their elements are in another order than the Gaussian's."""
    pipe = tiny_pipelines.flux()
    pipe.scheduler = TeleportScheduler(pipe.scheduler, gaussian(), skip=3)
    with pytest.raises(ValueError, match="but the Gaussian is of"):
        calls_of(pipe, pipe.transformer)
