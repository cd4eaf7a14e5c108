"""What a recipe chooses by name: processes, parametrisations, laws, models and data.

Processes, parametrisations and laws are the plain dataclasses of `fastdistill.diffusion`, so that a
recipe and a script say the same. Models and data are sections with keys of their own.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    model_validator,
)
from pydantic_core import core_schema

from fastdistill.diffusion import parametrisation as parametrisations
from fastdistill.diffusion import process as processes
from fastdistill.diffusion import timestep_pairs, timesteps


class _Choice:
    """A field that is one of several dataclasses, written as {name: ..., its fields}."""

    def __init__(self, kinds: Mapping[str, type]) -> None:
        self.kinds = kinds

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(
            self.parse, serialization=core_schema.plain_serializer_function_ser_schema(self.dump)
        )

    def parse(self, value: Any) -> Any:
        """The object that a mapping describes; an object of a known kind is itself."""
        if isinstance(value, tuple(self.kinds.values())):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(
                f"is {value!r}; expected a mapping with a name, as {{name: NAME, ...}}"
            )
        options = dict(value)
        name = options.pop("name", None)
        if name not in self.kinds:
            raise ValueError(f"name {name!r} is unknown{nearest(str(name), self.kinds)}")
        fields = {field.name for field in dataclasses.fields(self.kinds[name])}
        for key in options:
            if key not in fields:
                raise ValueError(f"{name} has no key {key!r}{nearest(key, fields)}")
        return TypeAdapter(self.kinds[name]).validate_python(options)

    def dump(self, value: Any) -> dict[str, Any]:
        """The mapping that `parse` reads back."""
        name = next(name for name, kind in self.kinds.items() if type(value) is kind)
        return {"name": name} | dataclasses.asdict(value)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a word: the known one that is nearest, or all of them."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


ProcessChoice = Annotated[
    Any,
    _Choice({"edm": processes.EDM, "vp": processes.VP, "rectified_flow": processes.RectifiedFlow}),
]
ParametrisationChoice = Annotated[
    Any,
    _Choice(
        {
            "edm": parametrisations.EDMPreconditioning,
            "epsilon": parametrisations.Epsilon,
            "v": parametrisations.V,
            "x0": parametrisations.X0,
            "flow": parametrisations.Flow,
        }
    ),
]
LawChoice = Annotated[
    Any,
    _Choice(
        {
            "log_normal_sigma": timesteps.LogNormalSigma,
            "log_uniform_sigma": timesteps.LogUniformSigma,
            "karras_index": timesteps.KarrasIndex,
            "uniform": timesteps.Uniform,
            "logit_normal": timesteps.LogitNormal,
            "fixed_list": timesteps.FixedList,
        }
    ),
]
PairLawChoice = Annotated[
    Any,
    _Choice({"ict": timestep_pairs.ImprovedPairs, "ect": timestep_pairs.EasyPairs}),
]


class Settings(BaseModel):
    """A section of a recipe: frozen, without unknown keys, each key documented where it stands."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def _absolute(path: Any) -> Any:
    """A folder as it is found from anywhere, since a run is resumed from other folders too."""
    return str(Path(path).resolve()) if isinstance(path, str) and path else path


FolderPath = Annotated[str | None, BeforeValidator(_absolute)]
FilePath = Annotated[str, BeforeValidator(_absolute)]


class DigitsModel(Settings):
    """The class-conditional residual MLP of the digits, trained in the run itself."""

    name: Literal["digits"]
    """digits: the network of teacher, student and critic."""
    width: PositiveInt = 256
    """Width of the hidden layers."""
    blocks: PositiveInt = 3
    """Residual blocks."""
    omega: bool = False
    """An input for what a conditioned augmentation has drawn."""


class MLPModel(Settings):
    """The residual MLP for vectors, trained in the run itself."""

    name: Literal["mlp"]
    """mlp: the network of student and critic, and of a teacher that is not exact."""
    width: PositiveInt = 128
    """Width of the hidden layers."""
    blocks: PositiveInt = 3
    """Residual blocks."""
    octaves: NonNegativeInt = 0
    """Sines and cosines of the inputs at 1, 2, 4, ... that are read beside them: networks of few
    inputs are too smooth for narrow modes without."""
    residual_critic: bool = False
    """The critic is the exact teacher and a network that begins at zero, and not a network alone,
    whose errors the student would take for the teacher's; needs teacher.exact."""


class PretrainedModel(Settings):
    """A diffusers model: the network is what the teacher's folder says."""

    name: Literal["pretrained"]
    """pretrained: student and critic start as copies of the teacher."""
    config: str | None = None
    """Published architecture that the recipe is made for, as sdxl: a teacher with another one is
    refused. null takes any."""
    sample_size: PositiveInt | None = None
    """Height and width of the samples; null takes what the model's configuration says."""
    features: tuple[int | str, ...] | None = None
    """Blocks whose outputs the discriminator reads, by name or number; null takes the usual ones of
    the architecture."""
    student_lora: PositiveInt | None = None
    """Rank of low-rank weights that are trained instead of the student's own; null trains all."""
    critic_lora: PositiveInt | None = None
    """Rank of the critic's low-rank weights upon the teacher's own, which are held once for both;
    null gives the critic weights of its own and trains all."""


class DigitsSet(Settings):
    """The UCI digits."""

    name: Literal["digits"]
    """digits: 1,797 real images of 8x8 in ten classes."""


class EncodedSet(Settings):
    """Latents or conditions that `fastdistill encode` made."""

    name: Literal["encoded"]
    """encoded: latents with the embeddings of their captions or with labels, or prompts alone."""
    path: FolderPath = None
    """Folder of the set; needed to run, as data=FOLDER."""


class ImageSet(Settings):
    """Images in folders, one a class, or in shards."""

    name: Literal["images"]
    """images: read as they are, for networks of pixels."""
    path: FolderPath = None
    """Folder of the images; needed to run, as data=FOLDER."""
    size: PositiveInt
    """Height and width that images are resized and cropped to."""


class LabelSet(Settings):
    """Class labels alone, for methods that need no real samples."""

    name: Literal["labels"]
    """labels: every class of the network alike."""


class MixtureSet(Settings):
    """A Gaussian mixture, of which the density and all scores are known."""

    name: Literal["mixture"]
    """mixture: endless samples, drawn by the seed and the step."""
    preset: Literal["ring", "correlated"]
    """ring: equal round modes on a circle in the plane. correlated: modes with covariances and
    weights of their own, from a fixed seed, in any dimension; one mode is a Gaussian."""
    modes: PositiveInt = 8
    """Number of modes."""
    dimensions: PositiveInt = 2
    """Numbers of one sample; a ring has two."""

    @model_validator(mode="after")
    def _ring_is_plane(self) -> MixtureSet:
        if self.preset == "ring" and self.dimensions != 2:
            raise ValueError(
                f"a ring lies in the plane, but dimensions is {self.dimensions}; choose preset "
                "correlated"
            )
        return self


def _named(value: Any) -> Any:
    """A bare name as the mapping that it is short for."""
    return {"name": value} if isinstance(value, str) else value


ModelChoice = Annotated[
    DigitsModel | MLPModel | PretrainedModel, Field(discriminator="name"), BeforeValidator(_named)
]
DataChoice = Annotated[
    DigitsSet | EncodedSet | ImageSet | LabelSet | MixtureSet,
    Field(discriminator="name"),
    BeforeValidator(_named),
]


class _RewardSettings(Settings):
    decode: bool = False
    """Reward the pictures that the teacher's VAE decodes from latents, and not the latents."""


class Linear(_RewardSettings):
    """Brightness."""

    name: Literal["linear"]
    """linear: slope times the mean of a sample's elements."""
    slope: float = 1.0
    """Factor; a negative one wants darkness."""


class Quadratic(_RewardSettings):
    """Nearness to a value."""

    name: Literal["quadratic"]
    """quadratic: minus half the mean of (x - target)^2."""
    target: float = 0.0
    """The value."""


class OfDigitsClassifier(_RewardSettings):
    """What the classifier says by which digits are judged."""

    name: Literal["digits_classifier"]
    """digits_classifier: log-probability of the class under the classifier that judges digits."""
    label: int | None = Field(default=None, ge=0, le=9)
    """The class wanted of every sample; null wants each sample's own."""


RewardChoice = Annotated[
    Linear | Quadratic | OfDigitsClassifier, Field(discriminator="name"), BeforeValidator(_named)
]


def check_reward(reward: Any, weight: float) -> None:
    """Raise ValueError for a reward without a weight, or a weight without a reward."""
    if (reward is not None) != (weight > 0):
        raise ValueError(
            f"reward is {'null' if reward is None else reward.name} with reward_weight {weight:g}; "
            "set both, or neither"
        )
