"""Recipes: what a run does, as checked and documented settings read from YAML.

Every mapping is checked when it is read: an unknown or ill-typed key is refused with the
nearest right one. What is chosen by ``name`` stands in `fastdistill.choices`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from fastdistill.choices import (
    DataChoice,
    FolderPath,
    LawChoice,
    ModelChoice,
    ParametrisationChoice,
    ProcessChoice,
    Settings,
    nearest,
)
from fastdistill.diffusion import timesteps
from fastdistill.objectives import METHODS, AugmentationSettings, BacktrackingMethod, Method
from fastdistill.optim.schedule import Schedule


class RecipeError(ValueError):
    """A recipe that cannot be run, with every fault that was found."""


class OptimizerSettings(Settings):
    """AdamW and its schedule, for one role."""

    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas; SiD and this project's digits use beta1 = 0 for student and critic."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    schedule: Schedule = "constant"
    """constant, linear or cosine."""
    warmup: NonNegativeInt = 0
    """Updates of linear warm-up."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Learning-rate factor at the end of a linear or cosine schedule."""
    clip_norm: PositiveFloat | None = None
    """Bound of the gradient's global norm; null leaves it alone."""


class TrainingSettings(Settings):
    """One stage of training."""

    steps: PositiveInt
    """Iterations; each is one critic update (or one update, without a critic)."""
    batch_size: PositiveInt
    """Samples of one micro-batch."""
    accumulation: PositiveInt = 1
    """Micro-batches of one update."""
    critic_updates_per_student_update: PositiveInt = 1
    """Critic updates for each update of the student: 5 means five."""
    sample_reuse: PositiveInt = 1
    """Critic updates that share a generated sample, each with noise of its own (docs/speed.md)."""
    drop_gradients: bool = False
    """In mode single let every backward pass make new gradients: fewer kernels and bytes, and twice
    the gradients' memory."""
    accelerate: bool = False
    """Replace layers of every network by those of fastdistill.accelerate: the same mathematics,
    with fewer activations kept."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: torch.compile the repeated blocks of every network; the first steps take longer."""
    cuda_graph: bool = False
    """Replay a step from a CUDA graph: on GPUs, in modes single and resident."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; bfloat16 ones have float32 master weights."""
    stochastic_rounding: bool = False
    """Round the bfloat16 weights stochastically, so that small updates are not lost on average."""
    moments: Literal["float32", "8bit"] = "float32"
    """Storage of AdamW's moments; 8bit ones are rounded stochastically, with a scale for 256."""
    student: OptimizerSettings
    """Optimizer of the network that is distilled (or, for a teacher, trained)."""
    critic: OptimizerSettings | None = None
    """Optimizer of the critic; null where the objective has none."""
    discriminator: OptimizerSettings | None = None
    """Optimizer of the discriminator; null where the objective has none."""
    ema_half_life: PositiveFloat = 500.0
    """Student updates after which an old weight counts half in the average."""
    log_every: PositiveInt = 50
    """Steps between log points: the only moments at which the host waits for the device."""
    sample_every: PositiveInt | None = None
    """Steps between sample grids and evaluations; null makes none."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints; one is also made at the end and on Ctrl-C."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept; at least two, so that a damaged newest one costs little."""

    @model_validator(mode="after")
    def _rounding_has_something_to_round(self) -> TrainingSettings:
        if self.stochastic_rounding and self.precision == "float32":
            raise ValueError("stochastic_rounding rounds bfloat16 weights; set precision: bfloat16")
        return self

    @model_validator(mode="after")
    def _reuse_has_something_to_reuse(self) -> TrainingSettings:
        if self.sample_reuse > self.critic_updates_per_student_update:
            raise ValueError(
                f"sample_reuse is {self.sample_reuse}, but a sample is too old after "
                "critic_updates_per_student_update, which is "
                f"{self.critic_updates_per_student_update}"
            )
        return self


class ParallelSettings(Settings):
    """How networks are spread over the processes that torchrun starts."""

    mode: Literal["auto", "single", "resident", "fsdp"] = "auto"
    """single: one process. resident: sharded states, weights gathered once an update, for networks
    up to about three billion parameters. fsdp: weights gathered unit by unit, for larger ones.
    auto: the first of these that fits the processes and the student."""
    shards: PositiveInt | None = None
    """Neighbouring processes that hold a network together, as those of one node (HSDP); null is
    all."""
    largest_unit: PositiveInt = 400_000_000
    """Parameters that are gathered together at most."""
    resident_roles: tuple[Literal["student", "critic", "discriminator"], ...] = ()
    """Roles whose gathered weights stay in mode fsdp too, where memory allows: the student's are
    then gathered once an update of it, and not for every batch of the critic's."""
    teacher: Literal["replicated", "sharded"] = "replicated"
    """The frozen teacher whole on every process, or sharded where it does not fit."""
    checkpoint_blocks: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them: slower by a
    forward, for networks whose activations do not fit."""
    timeout: PositiveFloat = 600.0
    """Seconds after which a process that waits for another ends the run."""


class TeacherSettings(Settings):
    """Where the teacher comes from, and how it samples."""

    path: str | None = None
    """A diffusers pipeline or model folder, a saved denoiser (a run's teacher/ or student/), or the
    name of a model on the Hub; null trains one in the run."""
    variant: str | None = None
    """Variant of the weight files, as fp16."""
    revision: str | None = None
    """Revision of a model on the Hub."""
    exact: bool = False
    """Score with the data's own density, where they are a mixture: a teacher without error, while
    student and critic start from the network that is trained or given here."""
    law: LawChoice = timesteps.LogNormalSigma()
    """Law of its training times."""
    condition_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the samples that train the null condition; guidance needs some."""
    augmentation: AugmentationSettings | None = None
    """ScoreAug in its training, for few data; null trains it on plain samples."""
    training: TrainingSettings | None = None
    """How it is trained; null with a path."""
    sampler_steps: PositiveInt = 18
    """Heun steps of its samples: n steps are 2 n - 1 evaluations."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of its samples, in grids and in the pairs of a warm-up."""

    @field_validator("path")
    @classmethod
    def _from_anywhere(cls, path: str | None) -> str | None:
        # A run is resumed from other folders too.
        return str(Path(path).resolve()) if path and Path(path).exists() else path

    @model_validator(mode="after")
    def _one_source(self) -> TeacherSettings:
        if self.path is not None and self.training is not None:
            raise ValueError("needs either path or training, and not both")
        if self.path is not None and self.augmentation is not None:
            raise ValueError("augmentation is set, but a teacher with a path is not trained here")
        _check_trains_one(self.training, "a teacher's")
        return self


class WarmupSettings(Settings):
    """Regression of the student to the teacher's ODE solutions, before the distillation."""

    pairs: PositiveInt
    """Trajectories of the teacher; rounded up to whole batches."""
    training: TrainingSettings
    """How the student is trained on them."""

    @model_validator(mode="after")
    def _no_critic(self) -> WarmupSettings:
        _check_trains_one(self.training, "a warm-up's")
        return self


class DegradationSettings(Settings):
    """The path from the teacher to the initial student, which objective backtracking goes back."""

    nodes: PositiveInt
    """Networks that are kept along the path, the last one at its end; the teacher is one more."""
    rank: PositiveInt | None = None
    """Keep each node as low-rank differences from the teacher, of this rank; null keeps all its
    weights."""
    training: TrainingSettings
    """How a copy of the teacher is trained on the initial student's samples."""

    @model_validator(mode="after")
    def _can_be_divided(self) -> DegradationSettings:
        _check_trains_one(self.training, "a degradation's")
        if self.training.steps % self.nodes:
            raise ValueError(
                f"training.steps is {self.training.steps}, which {self.nodes} nodes do not divide; "
                "choose a multiple"
            )
        return self


def _check_trains_one(training: TrainingSettings | None, whose: str) -> None:
    for name in ("critic", "discriminator", "sample_every"):
        if training is not None and getattr(training, name) is not None:
            raise ValueError(f"training.{name} is set, but {whose} training has no use for it")


if TYPE_CHECKING:
    ObjectiveChoice = Method
else:
    ObjectiveChoice = Annotated[Union[METHODS], Field(discriminator="name")]  # noqa: UP007


class EvaluationSettings(Settings):
    """How the student is judged."""

    samples: PositiveInt = 5000
    """Samples of teacher and student at the end."""
    samples_during_training: PositiveInt = 1000
    """Samples of the evaluations during training."""
    batch_size: PositiveInt = 1000
    """Samples that are made together."""


class Recipe(Settings):
    """Everything that a run is determined by, besides the machine."""

    name: str
    """Name of the run's folder under runs/ where none is given."""
    seed: NonNegativeInt = 0
    """Seed of every random number."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU where there is one."""
    threads: PositiveInt = 2
    """CPU threads; a run on a CPU repeats bitwise for one number of threads on one machine."""
    data: DataChoice
    """Data set: digits, mixture, encoded, images or labels."""
    model: ModelChoice
    """Network of all roles: digits, mlp or pretrained."""
    process: ProcessChoice | None = None
    """Forward process; of a pretrained teacher it is read, and checked where it is given."""
    parametrisation: ParametrisationChoice | None = None
    """What the networks predict; of a pretrained teacher it is read, and checked where given."""
    teacher: TeacherSettings
    """The teacher."""
    objective: ObjectiveChoice
    """The distillation method."""
    warmup: WarmupSettings | None = None
    """Regression before the distillation; null goes without."""
    degradation: DegradationSettings | None = None
    """The stage before the distillation that objective backtracking needs; others leave it out."""
    start: FolderPath = None
    """A saved student to start at, as another run's student/; null is a copy of the teacher."""
    start_noise: FolderPath = None
    """File of a fitted Gaussian (docs/gaussian.md): the student's first input has its marginal at
    that noise level, where null is pure noise."""
    training: TrainingSettings
    """The distillation."""
    parallel: ParallelSettings = ParallelSettings()
    """Processes."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """How the student is judged."""

    @model_validator(mode="after")
    def _optimizers_fit(self) -> Recipe:
        for role in self.objective.trains:
            if getattr(self.training, role) is None:
                raise ValueError(
                    f"training.{role} is missing: objective {self.objective.name} trains a {role}"
                )
        trains = self.teacher.training is not None
        for name, scale in (
            ("objective", self.objective.guidance_scale),
            ("teacher", self.teacher.guidance_scale),
        ):
            if scale != 1 and trains and self.teacher.condition_dropout == 0:
                raise ValueError(
                    f"{name}.guidance_scale needs a teacher that knows the null condition: set "
                    "teacher.condition_dropout, as 0.1"
                )
        return self

    @model_validator(mode="after")
    def _backtracking_has_a_path(self) -> Recipe:
        if not isinstance(self.objective, BacktrackingMethod):
            return self
        if self.degradation is None:
            raise ValueError("degradation is missing: objective backtracking goes its path back")
        if self.teacher.exact:
            raise ValueError(
                "objective backtracking goes along copies of the teacher's network, and an exact "
                "teacher has none: set teacher.exact: false, or choose another method"
            )
        self.objective.steps_per_node(self.degradation.nodes, self.training.steps)
        for role in ("student_lora", "critic_lora"):
            if getattr(self.model, role, None) is not None:
                raise ValueError(
                    f"model.{role} puts low-rank weights upon the teacher's own, which objective "
                    "backtracking replaces as it goes; set it to null"
                )
        if self.parallel.teacher == "sharded":
            raise ValueError(
                "parallel.teacher is sharded, but objective backtracking replaces the teacher's "
                "weights as it goes, which it can where they are whole; set replicated"
            )
        return self

    @property
    def augmentations(self) -> dict[str, AugmentationSettings]:
        """What transforms samples, by its key."""
        found = {
            "teacher.augmentation": self.teacher.augmentation,
            "objective.critic_augmentation": getattr(self.objective, "critic_augmentation", None),
        }
        return {key: value for key, value in found.items() if value is not None}

    @model_validator(mode="after")
    def _augmentation_can_be_told(self) -> Recipe:
        for key, augmentation in self.augmentations.items():
            if augmentation.conditioned and not getattr(self.model, "omega", False):
                raise ValueError(
                    f"{key}.conditioned is set, but model {self.model.name} cannot be told what "
                    "was drawn: set model.omega where it has the key (digits), or choose "
                    "transformations that need no telling"
                )
        return self

    @model_validator(mode="after")
    def _model_and_data_fit(self) -> Recipe:
        if self.warmup is not None and self.start is not None:
            raise ValueError("start is set, but a student that starts elsewhere needs no warmup")
        if self.model.name == "pretrained" and self.teacher.training is not None:
            raise ValueError("teacher.training is set, but a pretrained model is not trained here")
        own = {"digits": "digits", "mlp": "mixture"}.get(self.model.name)
        if own is not None:
            if self.data.name != own:
                raise ValueError(
                    f"model {self.model.name} is for data {own}, but data is {self.data.name}"
                )
            if self.teacher.path is None and self.teacher.training is None:
                raise ValueError("teacher needs either path or training")
        elif self.data.name in ("digits", "mixture"):
            raise ValueError(f"data {self.data.name} is not for pretrained models")
        if self.data.name == "mixture":
            if (self.teacher.guidance_scale, self.objective.guidance_scale) != (1, 1):
                raise ValueError("guidance_scale is set, but a mixture has no classes to guide by")
        elif self.teacher.exact:
            raise ValueError(f"teacher.exact needs data mixture, but data is {self.data.name}")
        if getattr(self.model, "residual_critic", False) and not self.teacher.exact:
            raise ValueError("model.residual_critic is upon an exact teacher: set teacher.exact")
        if self.data.name == "labels" and self.objective.needs_real:
            raise ValueError(
                f"data labels has no real samples, but objective {self.objective.name} learns from "
                "some: choose data encoded or images, or a data-free method (as reverse_kl with "
                "gan_weight 0)"
            )
        return self


RECIPES = Path(__file__).parent / "recipes"


def load_recipe(source: str | Path, overrides: Sequence[str] | None = None) -> Recipe:
    """Read a recipe by path or by the name of one that ships, with ``key=value`` overrides.

    Args:
        source: path of a YAML file, or a name such as ``digits``.
        overrides: as ``training.steps=100``; values are YAML.

    Raises:
        RecipeError: naming the unknown recipe, or every wrong key and the nearest right one.
    """
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        known = sorted(entry.stem for entry in RECIPES.glob("*.yaml"))
        raise RecipeError(f"no recipe {source!s}{nearest(str(source), known)}")
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path} holds no mapping of keys to values")
    for override in overrides or []:
        _override(document, override)
    return parse_recipe(document, str(source))


def parse_recipe(document: Mapping[str, Any], source: str) -> Recipe:
    """Check a recipe that was read already; errors are those of `load_recipe`."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise RecipeError(f"recipe {source} cannot be run:\n{faults}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r} is not of the form key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from error
    if isinstance(value, str) and isinstance(document.get(key), dict):
        if key in _FOLDERS:
            document[key] |= {"path": value} | _FOLDERS[key]
            return
        if key == "objective":
            document[key] = _other_method(document[key], value)
            return
    *parents, last = key.split(".")
    for parent in parents:
        if document.get(parent) is None:
            document[parent] = {}
        document = document[parent]
        if not isinstance(document, dict):
            raise RecipeError(f"override {override!r}: {parent!r} is a value, not a section")
    document[last] = value


_FOLDERS: dict[str, dict[str, Any]] = {"teacher": {"training": None}, "data": {}}
"""Sections that a bare folder may stand for, as teacher=FOLDER, and what else it then sets."""


def _other_method(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The section of another method, as objective=NAME asks for: it keeps times, laws, guidance."""
    known = next((m.model_fields for m in METHODS if _tag(m) == name), {})
    shared = {"student_times", "guidance_scale", "matching_law", "critic_law"} & set(known)
    return {"name": name} | {key: value for key, value in section.items() if key in shared}


def _explain(fault: Any) -> str:
    """One validation fault as a sentence with its key and, for unknown ones, the nearest."""
    location, section = _locate(fault["loc"])
    key = ".".join(location) or "recipe"
    match fault["type"]:
        case "extra_forbidden":
            return f"{key} is no key{nearest(location[-1], section.model_fields)}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}"
        case "union_tag_invalid":
            tag, known = fault["ctx"]["tag"], fault["ctx"]["expected_tags"]
            hint = nearest(tag, [name.strip(" '") for name in known.split(",")])
            return f"{key}: name {tag!r} is unknown{hint}"
        case "union_tag_not_found":
            return f"{key}.name is missing"
    return f"{key} is {fault['input']!r}: {fault['msg'].lower()}"


def _locate(places: Sequence[Any]) -> tuple[list[str], Any]:
    """The key that a fault is at, and the section that should have its last part.

    Where a section is chosen by name, pydantic puts that name between the two.
    """
    location: list[str] = []
    section: Any = None
    kinds: list[type[BaseModel]] = [Recipe]
    for part in map(str, places):
        if len(kinds) > 1 and part in map(_tag, kinds):
            kinds = [kind for kind in kinds if _tag(kind) == part]
            continue
        location.append(part)
        section = kinds[0] if len(kinds) == 1 else None
        field = section.model_fields.get(part) if section is not None else None
        kinds = _sections(field.annotation) if field is not None else []
    return location, section


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    candidates = getattr(annotation, "__args__", (annotation,))
    return [kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _tag(kind: type[BaseModel]) -> str:
    """The name by which a section is chosen."""
    return kind.model_fields["name"].annotation.__args__[0]  # type: ignore[union-attr]
