"""What a diffusers pipeline makes of texts and images, for its denoiser.

Texts go through the pipeline's own ``encode_prompt``, images through its VAE. The denoiser itself
is not loaded.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdistill.data.images import stack
from fastdistill.data.pixels import Decoded
from fastdistill.diffusion import Noise

Conditions = dict[str, Tensor]

SIZES = ("time_ids", "resolution", "aspect_ratio", "guidance")
"""Conditions that keep float32: numbers up to thousands, which half precision would round."""


class Encoder(Protocol):
    """Makes rows of an encoded set."""

    shape: tuple[int, ...]
    """Shape of one sample."""
    size: int
    """Height and width of the images."""
    classes: int | None
    """Number of classes of the model; None where the labels say it."""
    null: Conditions
    """One row of each condition that has a null; that of labels is the number of classes."""
    facts: dict[str, Any]
    """What else determines the rows."""

    def encode(self, decoded: Sequence[Decoded], first: int) -> Conditions:
        """Samples, labels and conditions of neighbouring records, float32, on the CPU.

        Args:
            decoded: the records.
            first: number of the first one.
        """


class PixelEncoder:
    """Keeps images as uint8 pixels, with their labels, for models of pixels."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.shape: tuple[int, ...] = (3, size, size)
        self.classes: int | None = None
        self.null: Conditions = {}
        self.facts: dict[str, Any] = {"size": size}

    def encode(self, decoded: Sequence[Decoded], first: int) -> Conditions:
        for one in decoded:
            if one.pixels is None:
                raise ValueError(f"{one.record.name} is no image; a set of pixels needs images")
        return {"samples": torch.stack([one.pixels for one in decoded if one.pixels is not None])}


class PipelineEncoder:
    """A pipeline's VAE and text encoders.

    Latents are ``(z - shift_factor) * scaling_factor``, z being the mean of the VAE's posterior or
    a sample of it, which is a function of the seed and the number of the sample. The VAE computes
    in float32.

    Args:
        teacher: a pipeline's folder, or its name on the Hub.
        images: whether images are to be encoded; the VAE is loaded for these alone.
        size: height and width of the images; the model's own if None.
        device: where the networks compute.
        precision: dtype of the text encoders.
        posterior: sample or mean.
        seed: seed of the posterior's samples.
        max_length: tokens of a prompt; the pipeline's own number if None.
        guidance: what a Flux model with embedded guidance is told.

    Raises:
        ValueError: for a folder that is no pipeline, a pipeline or VAE that is not known, and a
            size that its VAE cannot divide.
    """

    def __init__(
        self,
        teacher: Path | str,
        *,
        images: bool,
        size: int | None = None,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
        posterior: str = "sample",
        seed: int = 0,
        max_length: int | None = None,
        guidance: float = 3.5,
    ) -> None:
        self.device, self.guidance = torch.device(device), guidance
        self._index = load_config(teacher)
        self.name = self._index["_class_name"]
        if self.name != "DiTPipeline" and self.name not in _TEXTS:
            raise ValueError(
                f"{teacher} is a {self.name}; encode knows {', '.join(sorted(_TEXTS))} and "
                "DiTPipeline, and keeps pixels where no teacher is given"
            )
        self._model_config = load_config(teacher, self._model_name)
        vae_config = self._check_vae(teacher)
        self.size = self._choose_size(vae_config, size)
        self.shape: tuple[int, ...] = _latent_shape(vae_config, self.size)
        self.classes: int | None = (
            self._model_config["num_embeds_ada_norm"] if self._is_dit else None
        )
        self._posterior, self._noise = posterior, Noise(seed, self.device)
        self._pipeline = None if self._is_dit else self._load_texts(teacher, precision)
        self._vae: Any = self._load_vae(teacher) if images else None
        self._options = {} if max_length is None else {"max_sequence_length": max_length}
        if max_length is not None and self.name in _WITHOUT_MAX_LENGTH:
            raise ValueError(f"a {self.name} has prompts of its encoder's length; leave it out")
        self.null = {} if self._is_dit else self._encode_texts([""], null=True)
        self.facts = {
            "pipeline": self.name,
            "teacher": Path(teacher).name,
            "size": self.size,
            "precision": str(precision).removeprefix("torch."),
            "max_length": max_length,
            "scaling_factor": vae_config["scaling_factor"],
            "shift_factor": vae_config.get("shift_factor"),
        }
        if self._vae is not None:
            self.facts |= {"posterior": posterior, "vae_checksum": _checksum(self._vae)}
        if posterior == "sample" and self._vae is not None:
            self.facts["seed"] = seed
        if self._has_guidance:
            self.facts["guidance"] = guidance

    @torch.inference_mode()
    def encode(self, decoded: Sequence[Decoded], first: int) -> Conditions:
        rows: Conditions = {}
        if not self._is_dit:
            rows |= self._encode_texts([_text(one, self.name) for one in decoded])
            rows |= self._size_conditions(decoded)
        if decoded[0].record.content is not None:
            rows["samples"] = self._latents(decoded, first)
        return {
            name: value.float().cpu() if value.is_floating_point() else value.cpu()
            for name, value in rows.items()
        }

    @property
    def _is_dit(self) -> bool:
        return self.name == "DiTPipeline"

    @property
    def _model_name(self) -> str:
        return "unet" if "unet" in self._index else "transformer"

    @property
    def _has_guidance(self) -> bool:
        return bool(self._model_config.get("guidance_embeds"))

    def _check_vae(self, teacher: Path | str) -> Mapping[str, Any]:
        kind = self._index.get("vae", [None, None])[1]
        if kind != "AutoencoderKL":
            raise ValueError(f"{teacher} has a VAE of class {kind}; encode knows AutoencoderKL")
        return load_config(teacher, "vae")

    def _choose_size(self, vae: Mapping[str, Any], size: int | None) -> int:
        factor = _factor(vae)
        if size is None:
            return self._model_config.get("sample_size", 128) * factor  # Flux's model has none
        if size % factor:
            raise ValueError(f"size is {size}; this VAE needs a multiple of {factor}")
        return size

    def _load_texts(self, teacher: Path | str, precision: torch.dtype) -> Any:
        """The pipeline without denoiser, VAE and what else takes no part in texts."""
        import diffusers

        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"a {self.name} has text encoders of transformers, which is not installed: "
                "pip install 'fastdistill[text]'"
            ) from error
        unused = ("unet", "transformer", "vae", "safety_checker", "image_encoder")
        components: dict[str, Any] = {
            name: None
            for name, kind in self._index.items()
            if name in unused or (isinstance(kind, (list, tuple)) and kind[0] is None)
        }
        if self.name == "StableDiffusion3Pipeline" and "text_encoder_3" in components:
            with torch.device("meta"):  # whose configuration says how wide T5's zeros are
                kind = diffusers.SD3Transformer2DModel
                components["transformer"] = kind.from_config(self._model_config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions say dtype
            pipeline = getattr(diffusers, self.name).from_pretrained(
                teacher, torch_dtype=precision, **components
            )
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(self.device).requires_grad_(False).eval()
        return pipeline

    def _load_vae(self, teacher: Path | str) -> Any:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae").float()
        return vae.to(self.device).requires_grad_(False).eval()

    @torch.inference_mode()
    def _encode_texts(self, texts: list[str], null: bool = False) -> Conditions:
        made = _TEXTS[self.name](self._pipeline, texts, self.device, null, self._options)
        return {name: value.cpu() for name, value in made.items()}

    def _size_conditions(self, decoded: Sequence[Decoded]) -> Conditions:
        count, size = len(decoded), float(self.size)
        if self.name == "StableDiffusionXLPipeline":
            return {"time_ids": torch.tensor([self._time_ids(one) for one in decoded])}
        if self._has_guidance:
            return {"guidance": torch.full((count,), self.guidance)}
        if self.name.startswith("PixArt") and self._has_resolution():
            sizes = torch.full((count, 2), size)
            return {"resolution": sizes, "aspect_ratio": torch.ones(count, 1)}
        return {}

    def _time_ids(self, one: Decoded) -> list[float]:
        """SDXL's: original height and width, top and left of the crop, height and width."""
        original = one.original_size or (self.size, self.size)
        return [float(number) for number in (*original, *one.crop, self.size, self.size)]

    def _has_resolution(self) -> bool:
        """What `PixArtTransformer2DModel` takes its configuration to mean."""
        chosen = self._model_config.get("use_additional_conditions")
        return self._model_config["sample_size"] == 128 if chosen is None else chosen

    def _latents(self, decoded: Sequence[Decoded], first: int) -> Tensor:
        """Latents as the denoiser sees them; float arrays are such already  # [B, C, h, w]"""
        if any(one.sample is not None for one in decoded):
            return stack(decoded, self.shape)
        images = stack(decoded, (3, self.size, self.size)).to(self.device)
        posterior = self._vae.encode(images).latent_dist
        z = posterior.mean
        if self._posterior == "sample":
            index = torch.arange(first, first + len(decoded), device=self.device)
            z = z + posterior.std * self._noise.normal("posterior", index, z.shape[1:])
        return self._scale(z)

    def _scale(self, z: Tensor) -> Tensor:
        config = self._vae.config
        if getattr(config, "latents_mean", None) is not None:  # by channel, as Playground's VAE
            mean, std = (
                torch.tensor(values, device=z.device).view(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            return (z - mean) * config.scaling_factor / std
        return (z - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def load_config(teacher: Path | str, part: str | None = None) -> dict[str, Any]:
    """A pipeline's index, or the configuration of one of its parts.

    Raises:
        ValueError: where there is none.
    """
    from diffusers import AutoencoderKL, DiffusionPipeline

    kind: Any = DiffusionPipeline if part is None else AutoencoderKL  # whose load reads any model's
    try:
        return dict(kind.load_config(teacher, subfolder=part))
    except (OSError, ValueError) as error:
        what = "a diffusers pipeline" if part is None else f"one with {part}/config.json"
        raise ValueError(f"{teacher} is not the folder of {what}: {error}") from error


def _text(one: Decoded, pipeline: str) -> str:
    if one.record.text is None:
        raise ValueError(
            f"{one.record.name} has no text, which a {pipeline} needs; give it a caption"
        )
    return one.record.text


def _factor(vae: Mapping[str, Any]) -> int:
    """Pixels of an edge of one latent."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def _latent_shape(vae: Mapping[str, Any], size: int) -> tuple[int, ...]:
    return vae["latent_channels"], size // _factor(vae), size // _factor(vae)


def _checksum(module: torch.nn.Module) -> int:
    """CRC-32 of all weights, so that a set is not continued with others."""
    value = 0
    for weight in module.state_dict().values():
        value = zlib.crc32(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
    return value


def _stable_diffusion(
    pipeline: Any, texts: list[str], device: torch.device, null: bool, options: dict
) -> Conditions:
    prompts, negative = pipeline.encode_prompt(texts, device, 1, null)
    return {"encoder_hidden_states": negative if null else prompts}


def _stable_diffusion_xl(
    pipeline: Any, texts: list[str], device: torch.device, null: bool, options: dict
) -> Conditions:
    prompts, negative, pooled, negative_pooled = pipeline.encode_prompt(
        # The null is that of no negative prompt: zeros, if the pipeline says so.
        texts,
        device=device,
        do_classifier_free_guidance=null,
    )
    return {
        "encoder_hidden_states": negative if null else prompts,
        "text_embeds": negative_pooled if null else pooled,
    }


def _pixart(
    pipeline: Any, texts: list[str], device: torch.device, null: bool, options: dict
) -> Conditions:
    prompts, mask, negative, negative_mask = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=null, device=device, **options
    )
    return {
        "encoder_hidden_states": negative if null else prompts,
        "encoder_attention_mask": negative_mask if null else mask,
    }


def _stable_diffusion_3(
    pipeline: Any, texts: list[str], device: torch.device, null: bool, options: dict
) -> Conditions:
    prompts, negative, pooled, negative_pooled = pipeline.encode_prompt(
        texts, None, None, device=device, do_classifier_free_guidance=null, **options
    )
    return {
        "encoder_hidden_states": negative if null else prompts,
        "pooled_projections": negative_pooled if null else pooled,
    }


def _flux(
    pipeline: Any, texts: list[str], device: torch.device, null: bool, options: dict
) -> Conditions:
    prompts, pooled, _ = pipeline.encode_prompt(texts, None, device=device, **options)
    return {"encoder_hidden_states": prompts, "pooled_projections": pooled}


_TEXTS: dict[str, Callable[..., Conditions]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
}
_WITHOUT_MAX_LENGTH = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "DiTPipeline")
