"""Gaussians and mixtures in safetensors files: whole or absent, checked when they are read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdistill.gaussian.model import Fit, Gaussian, GaussianMixture

FORMAT = "fastdistill-gaussian-1"


def save_gaussian(
    path: Path | str,
    gaussian: Gaussian | GaussianMixture,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Gaussian or a mixture as one safetensors file.

    Args:
        path: the file; one that exists is replaced.
        gaussian: what is written.
        dtype: storage of the bases, which are nearly all of it; as they are if None.

    Raises:
        OSError: where the file cannot be written; one that was there is untouched.
    """
    path = Path(path)
    tensors, document = pack_gaussian(gaussian, dtype)
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"format": FORMAT, "gaussian": json.dumps(document)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def pack_gaussian(
    gaussian: Gaussian | GaussianMixture, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and a JSON document, from which `unpack_gaussian` makes the same again."""
    components = [gaussian]
    if isinstance(gaussian, GaussianMixture):
        components = [gaussian[k] for k in range(len(gaussian))]
    tensors: dict[str, Tensor] = {}
    about = []
    for k, one in enumerate(components):
        assert isinstance(one, Gaussian)
        basis = one.basis if dtype is None else one.basis.to(dtype)
        named = {"mean": one.mean, "basis": basis, "variances": one.variances}
        tensors |= {f"{k}.{name}": value.cpu().contiguous() for name, value in named.items()}
        about.append({"floor": one.floor, "fit": dataclasses.asdict(one.fit)})
    document = {"components": about, "mixture": False, "by_class": False}
    if isinstance(gaussian, GaussianMixture):
        document |= {"mixture": True, "by_class": gaussian.by_class}
        tensors["weights"] = gaussian.log_weights.double().exp().cpu()
    return tensors, document


def load_gaussian(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Gaussian | GaussianMixture:
    """Read what `save_gaussian` wrote.

    Args:
        path: the file.
        device: where it will compute.
        dtype: what it is held in.

    Raises:
        ValueError: for a file that is missing, damaged, of another kind or version, or whose
            numbers are no Gaussian; the file is named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; make one with `fastdistill gaussian fit`")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {metadata.get('format')!r}; expected {FORMAT!r}, as "
            "`fastdistill gaussian fit` writes"
        )
    try:
        gaussian = unpack_gaussian(tensors, json.loads(metadata["gaussian"]), dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no Gaussian: {error}") from error
    return gaussian.to(device)


def unpack_gaussian(
    tensors: dict[str, Tensor], document: dict[str, Any], dtype: torch.dtype = torch.float32
) -> Gaussian | GaussianMixture:
    """What `pack_gaussian` took apart.

    Raises:
        ValueError: for numbers that are no Gaussian, and tensors that belong to none.
        KeyError: for what is missing.
    """
    about, weights = document["components"], tensors.pop("weights", None)
    components = []
    for k, entry in enumerate(about):
        mean, basis, variances = (
            tensors.pop(f"{k}.{name}").to(dtype) for name in ("mean", "basis", "variances")
        )
        fit = dict(entry["fit"])
        fit["left_out"] = tuple(fit["left_out"])
        components.append(Gaussian(mean, basis, variances, entry["floor"], Fit(**fit)))
    if tensors:
        raise ValueError(f"unknown tensors {sorted(tensors)}")
    if not document["mixture"]:
        (gaussian,) = components
        return gaussian
    if weights is None:
        raise ValueError("a mixture without weights")
    return GaussianMixture(components, weights, document["by_class"])
