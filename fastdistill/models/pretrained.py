"""Denoisers from diffusers folders and the Hub, with what their schedulers say of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdistill.diffusion import (
    EDM,
    VP,
    X0,
    EDMPreconditioning,
    Epsilon,
    Flow,
    Parametrisation,
    Process,
    RectifiedFlow,
    V,
)
from fastdistill.models.adapters import ADAPTERS, build_network, diffusers_class
from fastdistill.models.denoiser import Denoiser

__all__ = [
    "Pretrained",
    "build_network",
    "check_agrees",
    "load_pretrained",
    "parametrisation_of",
    "process_of",
    "read_model_config",
]

_VP_SCHEDULERS = {
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDIMInverse",
        "DDIMParallel",
        "DDPM",
        "DDPMParallel",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LCM",
        "LMSDiscrete",
        "PNDM",
        "TCD",
        "UniPCMultistep",
    )
}
_FLOW_SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
_EDM_SCHEDULERS = {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
_FLOW_MODELS = {"SD3Transformer2DModel", "FluxTransformer2DModel"}
_MODEL_PARTS = ("unet", "transformer")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A teacher as its publishers left it."""

    denoiser: Denoiser
    """The network with process and parametrisation of its scheduler, frozen, in evaluation mode."""
    scheduler_config: dict[str, Any]
    """The scheduler's configuration, ``_class_name`` included."""
    model_config: dict[str, Any]
    """The model's diffusers configuration, from which `build_network` makes one like it."""
    source: str
    """Where it came from."""


def load_pretrained(
    source: str | Path,
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    features: Sequence[int | str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    scheduler: Mapping[str, Any] | None = None,
    sample_size: int | tuple[int, int] | None = None,
) -> Pretrained:
    """Load the denoising network of a diffusers pipeline; nothing else of it is read.

    Weights come from safetensors files, tensor by tensor into the model, in the dtype asked for.

    Args:
        source: a pipeline's folder (``model_index.json``), a model's folder (``config.json``, with
            ``scheduler/`` inside or beside it), or the name of either on the Hub.
        subfolder: the pipeline's part to load; ``unet`` or ``transformer``, whichever there is, if
            None.
        torch_dtype: dtype of the weights, and of what the network reads.
        device: where the weights go; the CPU if None.
        features: names or indices of the blocks whose outputs a discriminator reads.
        revision: branch, tag or commit on the Hub.
        variant: of the weights' files, as ``fp16``.
        scheduler: the scheduler's configuration, for a model without one.
        sample_size: height and width of samples, where the configuration does not say or other
            sizes are wanted.

    Raises:
        ValueError: for a source that holds no model, no safetensors or no scheduler, an
            architecture that has no adapter, or a scheduler that is not known or contradicts it.
    """
    hub = {"revision": revision}
    folder, part, config = _find_config(source, subfolder, hub)
    name = config.get("_class_name")
    if name not in ADAPTERS:
        raise ValueError(
            f"{_place(folder, part)} is a {name}; expected one of {', '.join(ADAPTERS)}"
        )
    found = dict(scheduler) if scheduler is not None else _find_scheduler(folder, part, hub)
    model = _load_model(name, folder, part, torch_dtype, {**hub, "variant": variant})
    network = ADAPTERS[name](
        model.to(device) if device is not None else model, features, sample_size
    )
    model_config = json.loads(model.to_json_string())
    model_config.pop("_name_or_path", None)
    denoiser = Denoiser(
        network,
        process_of(found, network.tokens),
        parametrisation_of(found, model_config),
        None if torch_dtype == torch.float32 else torch_dtype,
    )
    return Pretrained(denoiser.requires_grad_(False).eval(), found, model_config, str(source))


def read_model_config(
    source: str | Path, *, subfolder: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """The configuration of the model that `load_pretrained` would load; no weights are read.

    Raises:
        ValueError: for a source that holds no model.
    """
    return _find_config(source, subfolder, {"revision": revision})[2]


def process_of(scheduler_config: Mapping[str, Any], tokens: int | None = None) -> Process:
    """The forward process that a diffusers scheduler belongs to.

    Args:
        scheduler_config: its configuration, with ``_class_name``.
        tokens: image tokens of a sample, on which a flow scheduler's dynamic shift depends.

    Raises:
        ValueError: for a scheduler that is not known, or an option that would make it another
            process than those of `fastdistill.diffusion`.
    """
    config, name = scheduler_config, _scheduler_name(scheduler_config)
    if name in _EDM_SCHEDULERS:
        return EDM(
            config.get("sigma_min", 0.002), config.get("sigma_max", 80.0), config.get("rho", 7.0)
        )
    if name in _FLOW_SCHEDULERS:
        _refuse(config, "invert_sigmas", "shift_terminal")
        return RectifiedFlow(_shift(config, tokens))
    if config.get("use_flow_sigmas"):
        _refuse(config, "use_dynamic_shifting")
        return RectifiedFlow(config.get("flow_shift", 1.0))
    _refuse(config, "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale")
    if config.get("timestep_type", "discrete") != "discrete":
        _refuse(config, "timestep_type")
    steps, spacing = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    if spacing == "squaredcos_cap_v2":
        return VP.cosine(steps)
    if spacing not in ("linear", "scaled_linear"):
        raise ValueError(
            f"{name} has beta_schedule {spacing!r}; expected linear, scaled_linear or "
            "squaredcos_cap_v2"
        )
    start, end = _default_betas(name)
    return VP(config.get("beta_start", start), config.get("beta_end", end), spacing, steps)


def parametrisation_of(
    scheduler_config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> Parametrisation:
    """What the network predicts, as its scheduler reads its output.

    Args:
        scheduler_config: the scheduler's configuration, with ``_class_name``.
        model_config: the model's, with ``_class_name``.

    Raises:
        ValueError: for a prediction type that is not known, and where the two contradict.
    """
    config, name = scheduler_config, _scheduler_name(scheduler_config)
    model, prediction = model_config.get("_class_name"), config.get("prediction_type", "epsilon")
    steps = config.get("num_train_timesteps", 1000)
    flow = name in _FLOW_SCHEDULERS or bool(config.get("use_flow_sigmas"))
    if model in _FLOW_MODELS and not flow:
        raise ValueError(
            f"scheduler {name} contradicts {model}, which predicts a flow's velocity; expected a "
            "flow-matching scheduler, as FlowMatchEulerDiscreteScheduler"
        )
    _check_variance(config, model_config)
    if name in _EDM_SCHEDULERS:
        if prediction != "epsilon":
            raise ValueError(f"{name} has prediction_type {prediction!r}; expected 'epsilon'")
        return EDMPreconditioning(config.get("sigma_data", 0.5))
    if flow:
        if name not in _FLOW_SCHEDULERS and prediction != "flow_prediction":
            raise ValueError(
                f"{name} has use_flow_sigmas, but prediction_type {prediction!r}; expected "
                "'flow_prediction'"
            )
        return Flow(float(steps))
    kinds: dict[str, Parametrisation] = {
        "epsilon": Epsilon(),
        "v_prediction": V(),
        "sample": X0(),
    }
    if prediction not in kinds:
        raise ValueError(
            f"{name} has prediction_type {prediction!r}; expected one of {', '.join(kinds)}"
        )
    return kinds[prediction]


def check_agrees(what: str, found: Any, stated: Any, source: str) -> None:
    """Make sure that a process or parametrisation stated elsewhere is the one that was found.

    The grid on which times are laid out (EDM's sigma_min, sigma_max and rho, a flow's shift) is
    free: it is no property of the network.

    Args:
        what: ``process`` or ``parametrisation``.
        found: that of the pretrained model.
        stated: what a recipe says; None says nothing.
        source: the pretrained model.

    Raises:
        ValueError: where they differ.
    """
    if stated is not None and _without_grid(found) != _without_grid(stated):
        raise ValueError(
            f"the scheduler of {source} says {what} {found}, but {stated} was asked for; drop the "
            f"{what}, or take a teacher that was trained so"
        )


def _without_grid(value: Any) -> Any:
    return type(value) if isinstance(value, EDM | RectifiedFlow) else (type(value), value)


def _scheduler_name(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name")
    known = _VP_SCHEDULERS | _FLOW_SCHEDULERS | _EDM_SCHEDULERS
    if name not in known:
        raise ValueError(
            f"the scheduler's configuration says _class_name {name!r}; expected one of "
            f"{', '.join(sorted(known))}"
        )
    return name


def _refuse(config: Mapping[str, Any], *options: str) -> None:
    for option in options:
        if config.get(option):
            raise ValueError(
                f"{config['_class_name']} has {option} = {_short(config[option])}, which is not "
                "supported"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]} ..."


def _default_betas(name: str) -> tuple[float, float]:
    """A scheduler's defaults, which an old configuration may leave out."""
    if name in ("LCMScheduler", "TCDScheduler", "HeunDiscreteScheduler") or "KDPM2" in name:
        return 0.00085, 0.012
    return 1e-4, 2e-2


def _shift(config: Mapping[str, Any], tokens: int | None) -> float:
    """The factor of sigma / alpha at a position of the usual grid."""
    if not config.get("use_dynamic_shifting"):
        return config.get("shift", 1.0)
    if tokens is None:
        raise ValueError(
            f"{config['_class_name']} has use_dynamic_shifting, whose shift depends on the image's "
            "size; give tokens="
        )
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    mu = low + (high - low) * (tokens - first) / (last - first)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _check_variance(scheduler: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """A scheduler that reads a learned variance needs a model that predicts one."""
    if not str(scheduler.get("variance_type", "")).startswith("learned"):
        return
    inputs, outputs = model.get("in_channels"), model.get("out_channels")
    if inputs is not None and outputs != 2 * inputs:
        raise ValueError(
            f"scheduler {scheduler['_class_name']} reads a variance (variance_type "
            f"{scheduler['variance_type']!r}), but {model.get('_class_name')} has {outputs} output "
            f"channels for {inputs} input channels; expected {2 * inputs}"
        )


def _find_config(
    source: str | Path, subfolder: str | None, hub: Mapping[str, Any]
) -> tuple[str, str | None, dict[str, Any]]:
    """The source, the part of it that is the denoising network, and the part's configuration."""
    folder, part = _find_model(source, subfolder, hub)
    config = _read_config(folder, part, "config.json", hub)
    if config is None:
        if Path(folder).is_dir():
            raise ValueError(
                f"{_place(folder, part)} has no config.json; expected a diffusers model"
            )
        raise ValueError(
            f"{_place(folder, part)} is neither a folder nor a diffusers model that the Hub, or "
            "its cache here, gives"
        )
    return folder, part, config


def _find_model(
    source: str | Path, subfolder: str | None, hub: Mapping[str, Any]
) -> tuple[str, str | None]:
    """The source and the part of it that is the denoising network."""
    folder = str(source)
    if subfolder is not None:
        return folder, subfolder
    index = _read_config(folder, None, "model_index.json", hub)
    if index is None:
        return folder, None
    parts = [name for name in _MODEL_PARTS if index.get(name)]
    if len(parts) != 1:
        raise ValueError(
            f"{source}: model_index.json names {', '.join(parts) or 'neither'} of "
            f"{' and '.join(_MODEL_PARTS)}; expected one, or subfolder="
        )
    return folder, parts[0]


def _find_scheduler(folder: str, part: str | None, hub: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in ``scheduler/`` of the pipeline, or beside a model's folder."""
    places: list[tuple[str, str | None]] = [(folder, "scheduler")]
    if part is None:
        places += [(folder, None)]
        if Path(folder).is_dir():
            places += [(str(Path(folder).resolve().parent), "scheduler")]
    for place, subfolder in places:
        config = _read_config(place, subfolder, "scheduler_config.json", hub)
        if config is not None:
            return config
    raise ValueError(
        f"{folder} has no scheduler/scheduler_config.json, which says what the network predicts; "
        "load the pipeline's folder, or give scheduler="
    )


def _read_config(
    folder: str, part: str | None, file: str, hub: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A JSON file of a folder or of a repository on the Hub; None where it is missing."""
    if Path(folder).is_dir():
        path = Path(folder, part or "", file)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    found = _download(folder, f"{part}/{file}" if part else file, hub)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def _download(repository: str, file: str, hub: Mapping[str, Any]) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return hf_hub_download(repository, file, **hub)
    except (EntryNotFoundError, HFValidationError):
        return None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{repository}: {str(error).splitlines()[0]}") from error


def _load_model(
    name: str, folder: str, part: str | None, dtype: torch.dtype, options: Mapping[str, Any]
) -> Any:
    place = Path(folder, part or "")
    if place.is_dir() and not any(place.glob("*.safetensors")):
        raise ValueError(
            f"{place} has no .safetensors file, and nothing is unpickled; convert its weights with "
            "diffusers' save_pretrained(..., safe_serialization=True)"
        )
    extra = {} if part is None else {"subfolder": part}
    try:
        return diffusers_class(name).from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, **extra, **options
        )
    except OSError as error:
        raise ValueError(
            f"{_place(folder, part)} has no safetensors weights that diffusers can load: {error}"
        ) from error


def _place(folder: str, part: str | None) -> str:
    return f"{folder}/{part}" if part else folder
