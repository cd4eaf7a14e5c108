"""From a diffusers VAE's latents, as denoisers see them, back to pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LatentDecoder:
    """Pictures of latents, differentiable in them.

    Denoisers see ``(z - shift_factor) * scaling_factor``, or, of a VAE that knows each channel's
    mean and standard deviation, ``(z - latents_mean) * scaling_factor / latents_std``.

    Args:
        vae: a diffusers AutoencoderKL, where it is wanted; it is frozen.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.requires_grad_(False).eval()
        config = vae.config
        self._scale: float | Tensor = 1 / config.scaling_factor
        self._shift: float | Tensor = getattr(config, "shift_factor", None) or 0.0
        if getattr(config, "latents_mean", None) is not None:
            self._shift, std = (
                torch.tensor(values, dtype=vae.dtype, device=vae.device).view(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            self._scale = std / config.scaling_factor

    def __call__(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in about [-1, 1] of latents [B, C, h, w], in the VAE's dtype."""
        z = latents.to(self.vae.dtype) * self._scale + self._shift
        return self.vae.decode(z).sample
