"""Saved denoisers: a folder with weights (safetensors), what they mean (JSON) and checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdistill.choices import (
    DigitsModel,
    MLPModel,
    ParametrisationChoice,
    ProcessChoice,
    Settings,
)
from fastdistill.config import Recipe
from fastdistill.diffusion import EDM, EDMPreconditioning
from fastdistill.engine.folder import MANIFEST, check_folder, commit_folder, read_document
from fastdistill.engine.shards import read_tensors
from fastdistill.gaussian import Gaussian
from fastdistill.gaussian.files import pack_gaussian, unpack_gaussian
from fastdistill.models import Denoiser
from fastdistill.models.digits import DigitsNetwork


class DiffusersModel(Settings):
    """A diffusers model, which is rebuilt without the folder that its first weights came from."""

    name: Literal["diffusers"] = "diffusers"
    config: dict[str, Any]
    """Its configuration as diffusers writes it, ``_class_name`` included."""
    lora: PositiveInt | None = None
    """Rank of the low-rank weights; the folder holds these and the base weights apart."""
    scheduler: dict[str, Any] | None = None
    """Configuration of the teacher's scheduler."""
    source: str | None = None
    """The teacher's folder or its name on the Hub: where its VAE and text encoders are."""


def own_network(
    model: DigitsModel | MLPModel, shape: tuple[int, ...], classes: int
) -> DigitsNetwork:
    """The network of a model section that is trained in the run itself, with fresh weights."""
    omega = isinstance(model, DigitsModel) and model.omega
    octaves = model.octaves if isinstance(model, MLPModel) else 0
    return DigitsNetwork(shape, classes, model.width, model.blocks, omega=omega, octaves=octaves)


class DenoiserDescription(Settings):
    """What is needed to rebuild a denoiser before its weights are loaded."""

    model: Annotated[DigitsModel | MLPModel | DiffusersModel, Field(discriminator="name")]
    shape: tuple[int, ...]
    classes: int
    process: ProcessChoice
    parametrisation: ParametrisationChoice
    times: tuple[float, ...] | None = None
    """A student's times from the noisiest on; None for a denoiser that is sampled by an ODE."""
    two_times: bool = False
    """Whether the network is told a second time, as mean_flow's student is."""

    @classmethod
    def of(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> DenoiserDescription:
        """The description of the networks of a recipe that trains its own teacher.

        Raises:
            ValueError: for a recipe whose networks are what its teacher is.
        """
        if not isinstance(recipe.model, DigitsModel | MLPModel):
            raise ValueError(f"model {recipe.model.name} takes its description from its teacher")
        return cls(
            model=recipe.model,
            shape=shape,
            classes=classes,
            process=recipe.process or EDM(),
            parametrisation=recipe.parametrisation or EDMPreconditioning(),
        )

    def build(self, seed: int = 0) -> Denoiser:
        """A denoiser with fresh weights, which depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser = Denoiser(self._network(), self.process, self.parametrisation)
        if self.two_times:
            denoiser.add_second_time()
        return denoiser

    def _network(self) -> Any:
        model = self.model
        if isinstance(model, DigitsModel | MLPModel):
            return own_network(model, self.shape, self.classes)
        from fastdistill.models.pretrained import build_network

        network = build_network(model.config, sample_size=(self.shape[1], self.shape[2]))
        if model.lora is not None:
            from fastdistill.models.lora import add_lora

            add_lora(network, model.lora)
        return network


class SavedDenoiser(NamedTuple):
    """A denoiser read from a folder."""

    denoiser: Denoiser
    description: DenoiserDescription


def is_saved_denoiser(folder: Path | str) -> bool:
    """Whether `save_denoiser` wrote a folder, whole or damaged since."""
    return (Path(folder) / MANIFEST).is_file()


def save_denoiser(
    folder: Path,
    weights: dict[str, Tensor],
    description: DenoiserDescription,
    start: Gaussian | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json``, whole or not at all.

    Args:
        folder: where to; a folder that exists is replaced.
        weights: state dict of the network.
        description: what it is.
        start: the Gaussian that a student's first input is of; it goes into ``start.*``.
    """
    tensors, documents = {"model": weights}, {"config": description.model_dump(mode="json")}
    if start is not None:
        tensors["start"], documents["start"] = pack_gaussian(start)
    commit_folder(folder, tensors, documents)


def load_denoiser(folder: Path | str, device: torch.device | str = "cpu") -> SavedDenoiser:
    """Read what `save_denoiser` wrote, in float32 and evaluation mode.

    Raises:
        DamagedFolderError: for a folder that is not whole.
        ValueError: for weights that do not fit the description.
    """
    folder = Path(folder)
    check_folder(folder)
    description = DenoiserDescription.model_validate(read_document(folder, "config"))
    with _WithoutInitialisation():
        denoiser = description.build()
    try:
        denoiser.network.load_state_dict(read_tensors(folder, "model"))
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit config.json: {error}") from error
    if (folder / "start.json").exists():
        start = unpack_gaussian(read_tensors(folder, "start"), read_document(folder, "start"))
        denoiser.start = start
    return SavedDenoiser(denoiser.to(device).eval(), description)


def load_weights(folder: Path, denoiser: Denoiser) -> None:
    """Fill a denoiser with the weights of a saved one of its kind, which may have a second time.

    Of a network with LoRA weights these alone are read: the base is what it is.

    Raises:
        DamagedFolderError: for a folder that is not whole.
        ValueError: for weights of another network.
    """
    check_folder(folder)
    if read_document(folder, "config").get("two_times"):
        denoiser.add_second_time()
    rebuilt: frozenset[str] = getattr(denoiser.network, "rebuilt", frozenset())
    tensors = read_tensors(folder, "model")
    weights = {name: value for name, value in tensors.items() if name not in rebuilt}
    missing, unknown = denoiser.network.load_state_dict(weights, strict=False)
    if unknown or set(missing) - rebuilt:
        raise ValueError(f"{folder}: the weights are those of another network")


class _WithoutInitialisation(TorchFunctionMode):
    """Leaves weights as they are where torch.nn.init would set them, since they are loaded next."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)
