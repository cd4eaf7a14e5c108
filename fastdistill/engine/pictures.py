"""Samples as pictures: pixels as they are, latents decoded by the teacher's VAE."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.engine.saved import DenoiserDescription, DiffusersModel
from fastdistill.models.latents import LatentDecoder


class Pictures:
    """Turns samples [n, ...] into pictures [n, 1 or 3, H, W] in [-1, 1].

    Args:
        description: what the samples are of.
        device: where latents are decoded.
    """

    def __init__(self, description: DenoiserDescription, device: torch.device) -> None:
        self.shape, self.device = description.shape, device
        model = description.model
        self.source = model.source if isinstance(model, DiffusersModel) else None

    @property
    def is_latent(self) -> bool:
        """Whether samples are no pictures themselves."""
        return self.shape[0] not in (1, 3)

    @property
    def note(self) -> str:
        """What to say of pictures that are no decoded images; empty where there is nothing."""
        if self.is_latent and self._vae is None:
            return "latents undecoded, as the teacher has no VAE: channels 1 to 3"
        return ""

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Pictures of samples, on the CPU."""
        if not self.is_latent:
            return samples.float().cpu()
        if self._vae is None:
            channels = 3 if samples.shape[1] >= 3 else 1
            return samples[:, :channels].float().cpu() / 3  # latents have about unit variance
        # One by one, since a decoder's activations are far larger than the denoiser's.
        return torch.cat([self._vae(one[None].to(self.device)).cpu() for one in samples])

    @functools.cached_property
    def _vae(self) -> LatentDecoder | None:
        return None if self.source is None else find_decoder(self.source, self.device)


def find_decoder(source: str, device: torch.device) -> LatentDecoder | None:
    """The decoder of the pipeline that a teacher comes from; None where there is none."""
    kind = _pipeline(source).get("vae")
    if not kind:
        return None
    import diffusers

    vae = getattr(diffusers, kind[1]).from_pretrained(
        source, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True
    )
    return LatentDecoder(vae.to(device))


def _pipeline(source: str) -> Mapping[str, Any]:
    """model_index.json of a folder or of a repository on the Hub; empty where there is none."""
    file: Path | str | None = Path(source) / "model_index.json"
    if not Path(source).is_dir():
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(source, "model_index.json")  # the teacher was loaded from it
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {}
    return json.loads(Path(file).read_text())
