"""Recipes: those that ship are right, and wrong ones are refused with the nearest right key."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from fastdistill.config import (
    RECIPES,
    ObjectiveSettings,
    Recipe,
    RecipeError,
    TrainingSettings,
    dump_recipe,
    load_recipe,
    parse_recipe,
)
from fastdistill.engine.job import make_objective
from fastdistill.engine.saved import DenoiserDescription
from fastdistill.objectives import MatchingSettings


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_ship_are_read_and_written_without_loss(path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "again") == recipe


def test_overrides_change_nested_keys():
    recipe = load_recipe("digits", ["training.steps=7", "training.student.lr=1e-2", "seed=3"])
    assert (recipe.training.steps, recipe.training.student.lr, recipe.seed) == (7, 0.01, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", "training.stepz is no key; did you mean 'steps'"),
        ("trainin.steps=3", "trainin is no key; did you mean 'training'"),
        ("training.student.lrr=3", "training.student.lrr is no key; did you mean 'lr'"),
        ("training.steps=soon", "training.steps is 'soon'"),
        ("training.steps=0", "training.steps is 0"),
        ("training.steps.more=1", "'steps' is a value"),
        ("process.sigma_mix=3", "edm has no key 'sigma_mix'; did you mean 'sigma_min'"),
        ("process.name=edn", "name 'edn' is unknown; did you mean 'edm'"),
        ("objective.divergence=jensen", "did you mean jensen_shannon"),
        ("objective.student_times=[]", "objective.student_times"),
        ("objective.guidance_scale=2", "teacher.condition_dropout"),
        ("teacher.path=somewhere", "either path or training"),
        ("teacher.training.sample_every=10", "training.sample_every is set"),
        ("training.critic=null", "training.critic is missing"),
        ("device", "not of the form key=value"),
        ("training.steps=[1", "not YAML"),
    ],
)
def test_a_wrong_override_is_refused_with_its_key(override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe("digits", [override])
    assert message in str(error.value)


def test_a_divergence_that_needs_a_discriminator_needs_its_optimizer():
    overrides = ["objective.divergence=forward_kl", "training.discriminator=null"]
    with pytest.raises(RecipeError, match=r"training\.discriminator is missing"):
        load_recipe("digits", overrides)


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'digits'"):
        load_recipe("digit")


def test_a_file_that_is_no_recipe_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    for content, message in (("[1, 2]", "no mapping"), ("a: [", "not YAML"), ("{}", "is missing")):
        path.write_text(content)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


def test_a_recipe_can_say_every_number_of_the_method():
    fields = {field.name for field in dataclasses.fields(MatchingSettings)}
    assert fields <= set(ObjectiveSettings.model_fields)
    teacher = DenoiserDescription.of(load_recipe("digits"), (1, 8, 8), 10).build()
    recipe = load_recipe("digits", ["objective.ratio_max=7", "objective.divergence=forward_kl"])
    settings = make_objective(recipe, teacher).settings
    assert (settings.ratio_max, settings.divergence.name) == (7.0, "forward_kl")


def test_every_key_is_documented():
    def sections(model):
        yield model
        for field in model.model_fields.values():
            kinds = getattr(field.annotation, "__args__", (field.annotation,))
            for kind in kinds:
                if isinstance(kind, type) and hasattr(kind, "model_fields"):
                    yield from sections(kind)

    found = set(sections(Recipe))
    assert TrainingSettings in found
    for section in found:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
