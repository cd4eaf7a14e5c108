"""The networks of a run: the teacher as it is found, and what is made of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from fastdistill.choices import (
    DigitsModel,
    MixtureSet,
    MLPModel,
    PretrainedModel,
    RewardChoice,
)
from fastdistill.config import Recipe, RecipeError
from fastdistill.engine.inputs import make_mixture
from fastdistill.engine.rewards import make_reward
from fastdistill.engine.saved import (
    DenoiserDescription,
    DiffusersModel,
    SavedDenoiser,
    is_saved_denoiser,
    load_denoiser,
    load_weights,
)
from fastdistill.gaussian import Gaussian, load_gaussian
from fastdistill.models import Denoiser, ExactDenoiser, ResidualCritic
from fastdistill.objectives import Discriminator, Objective, Reward
from fastdistill.objectives.backtracking import DegradationPath


def load_teacher(recipe: Recipe, device: torch.device | str = "cpu") -> SavedDenoiser:
    """The teacher that a recipe names, whole and in float32, and what it is.

    Raises:
        RecipeError: for a recipe without one, or one that is made for another teacher.
        ValueError: for a folder that holds none, or holds what cannot be read.
    """
    path = recipe.teacher.path
    if path is None:
        raise RecipeError(
            f"recipe {recipe.name} needs a teacher: give teacher=FOLDER, a diffusers pipeline's or "
            "a model's folder or its name on the Hub"
        )
    if is_saved_denoiser(path):
        teacher = load_denoiser(path, device)
    elif isinstance(recipe.model, PretrainedModel):
        teacher = _load_pretrained(recipe, path, device)
    else:
        raise RecipeError(
            f"{path} is no saved denoiser, which a teacher of model {recipe.model.name} is; give a "
            "run's teacher/ or student/"
        )
    _check_fits(recipe, teacher.description, path)
    return teacher


def _load_pretrained(recipe: Recipe, path: str, device: torch.device | str) -> SavedDenoiser:
    from fastdistill.models.pretrained import load_pretrained, read_model_config

    assert isinstance(recipe.model, PretrainedModel)
    found = read_model_config(path, revision=recipe.teacher.revision)
    _check_architecture(recipe.model.config, found, path)
    loaded = load_pretrained(
        path,
        device=device,
        features=recipe.model.features,
        sample_size=recipe.model.sample_size,
        revision=recipe.teacher.revision,
        variant=recipe.teacher.variant,
    )
    network = loaded.denoiser.network
    description = DenoiserDescription(
        model=DiffusersModel(
            config=loaded.model_config,
            scheduler=loaded.scheduler_config,
            source=loaded.source,
        ),
        shape=network.sample_shape,
        classes=network.classes,
        process=loaded.denoiser.process,
        parametrisation=loaded.denoiser.parametrisation,
    )
    return SavedDenoiser(loaded.denoiser, description)


def _check_fits(recipe: Recipe, found: DenoiserDescription, path: str) -> None:
    """Make sure that a recipe was written for this teacher."""
    if isinstance(recipe.model, DigitsModel | MLPModel):
        wanted: dict[str, Any] = {"model": recipe.model}
    elif not isinstance(found.model, DiffusersModel):
        raise RecipeError(
            f"teacher {path} is a model {found.model.name}, but the recipe is for a diffusers model"
        )
    elif found.model.lora is not None:
        raise RecipeError(f"teacher {path} has LoRA weights apart; export it with them merged")
    else:
        wanted = {}
        _check_architecture(recipe.model.config, found.model.config, path)
    wanted |= {"process": recipe.process, "parametrisation": recipe.parametrisation}
    for name, want in wanted.items():
        have = getattr(found, name)
        if want is not None and have != want:
            raise RecipeError(
                f"teacher {path} has {name} {have}, but the recipe has {want}; drop {name} from "
                "the recipe where the teacher is right, or give another teacher"
            )


def _check_architecture(name: str | None, found: dict[str, Any], path: str) -> None:
    if name is None:
        return
    from fastdistill.models.configs import model_configuration

    for key, want in model_configuration(name).items():
        have = found.get(key, want)  # what a file leaves out has diffusers' default
        if (list(have) if isinstance(have, tuple) else have) != want:
            raise RecipeError(
                f"teacher {path} has {key} {have}, but the recipe is for {name}, which has {want}; "
                "give such a teacher, or another recipe, or model.config=null to take it anyway"
            )


class RunNetworks:
    """The networks of a recipe's objective, each made when it is asked for.

    Args:
        recipe: what is run.
        teacher: as `load_teacher` gives it. It may become the critic, so that no more copies are
            made than the run needs: use ``self.teacher`` afterwards.
        start: a saved student to begin with, as a warm-up's.
        path: the degradation path, where a stage before made one.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Denoiser,
        start: Path | None = None,
        path: DegradationPath | None = None,
    ) -> None:
        self.recipe, self.training = recipe, recipe.training
        self.path = path
        self._given = teacher
        self.teacher = make_frozen(recipe, teacher)
        self.student = make_student(recipe, teacher, self.teacher)
        if start is not None:
            load_weights(start, self.student)

    def critic(self) -> Denoiser:
        rank = _rank(self.recipe, "critic_lora")
        if rank is None:
            critic = self._given.requires_grad_(True).train()
            if not getattr(self.recipe.model, "residual_critic", False):
                return critic
            assert isinstance(self.teacher, ExactDenoiser)
            return ResidualCritic(self.teacher, critic)
        from fastdistill.models.lora import shared_lora_critic

        return shared_lora_critic(self.teacher, rank, seed=self.recipe.seed + 3)

    def discriminator(self) -> Discriminator:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed + 1)
            return Discriminator(self.teacher.network.feature_shapes)

    def reward(self, choice: RewardChoice) -> Reward:
        device = next(self.teacher.parameters()).device
        return make_reward(choice, self.recipe.teacher.path, device)


def make_objective(recipe: Recipe, teacher: Denoiser, start: Path | None = None) -> Objective:
    """The recipe's objective, on the networks that `RunNetworks` makes of the same arguments."""
    return recipe.objective.build(RunNetworks(recipe, teacher, start))


def make_frozen(recipe: Recipe, teacher: Denoiser) -> Denoiser:
    """What is not trained and gives the scores: the teacher, in the precision that the run has.

    A copy, or the data's exact denoiser with a copy that a discriminator can read.
    """
    frozen = copy.deepcopy(teacher).requires_grad_(False).eval()
    if recipe.teacher.exact:
        assert isinstance(recipe.data, MixtureSet)
        device = next(frozen.parameters()).device
        return ExactDenoiser(make_mixture(recipe.data), frozen.process, frozen).to(device)
    if recipe.training.precision == "bfloat16":
        frozen.network.to(torch.bfloat16)
        frozen.input_dtype = torch.bfloat16
    return frozen


def make_student(recipe: Recipe, teacher: Denoiser, frozen: Denoiser) -> Denoiser:
    """The student as it starts: a copy of the teacher, or low-rank weights upon the frozen one's.

    Args:
        recipe: what is run.
        teacher: in float32.
        frozen: the teacher of the run, whose weights low-rank ones share.
    """
    rank = _rank(recipe, "student_lora")
    if rank is None:
        student = copy.deepcopy(teacher).requires_grad_(True).train()
    else:
        from fastdistill.models.lora import add_lora

        shared = {id(value): value for value in (*frozen.parameters(), *frozen.buffers())}
        student = copy.deepcopy(frozen, shared).train()
        add_lora(student.network, rank, seed=recipe.seed + 2)
    path = recipe.start_noise
    student.start = None if path is None else _start_noise(path, student)
    return student


def _start_noise(path: str, student: Denoiser) -> Gaussian:
    """The Gaussian whose marginal a student starts from, on its device."""
    gaussian = load_gaussian(path, next(student.parameters()).device)
    if not isinstance(gaussian, Gaussian):
        raise RecipeError(
            f"start_noise {path} is a mixture, whose marginal is no map of noise; fit one Gaussian"
        )
    return gaussian


def _rank(recipe: Recipe, role: str) -> int | None:
    return getattr(recipe.model, role, None)


def describe_student(recipe: Recipe, teacher: DenoiserDescription) -> DenoiserDescription:
    """What the recipe's student is."""
    model = teacher.model
    if isinstance(recipe.model, PretrainedModel) and isinstance(model, DiffusersModel):
        model = model.model_copy(update={"lora": recipe.model.student_lora})
    return teacher.model_copy(update={"model": model, "times": recipe.objective.student_times})


def checkpoint_blocks(objective: Objective) -> None:
    """Recompute activations in backward passes, in every network that has one.

    Raises:
        RecipeError: for a network that cannot.
    """
    for denoiser in objective.graded():
        if not hasattr(denoiser.network, "enable_gradient_checkpointing"):
            raise RecipeError(
                f"parallel.checkpoint_blocks: {type(denoiser.network).__name__} has no "
                "enable_gradient_checkpointing()"
            )
        denoiser.network.enable_gradient_checkpointing()
