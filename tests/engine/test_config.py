"""Recipes: those that ship are right, and wrong ones are refused with the nearest right key."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from fastdistill.config import (
    RECIPES,
    Recipe,
    RecipeError,
    TrainingSettings,
    dump_recipe,
    load_recipe,
    parse_recipe,
)
from fastdistill.engine.roles import make_objective
from fastdistill.engine.saved import DenoiserDescription
from fastdistill.objectives import METHODS, DistributionMatchingMethod, MatchingSettings


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
        ("model.widht=3", "model.widht is no key; did you mean 'width'"),
        ("model.name=digit", "model: name 'digit' is unknown; did you mean 'digits'"),
        ("model={width: 3}", "model.name is missing"),
        ("data={name: imges}", "data: name 'imges' is unknown; did you mean 'images'"),
        ("data={name: labels}", "model digits is for data digits, but data is labels"),
        ("data=folder", "data.path is no key"),
        ("model={name: pretrained}", "a pretrained model is not trained here"),
        ("teacher={}", "teacher needs either path or training"),
        ("teacher.guidance_scale=2", "teacher.condition_dropout"),
        ("warmup={pairs: 3}", "warmup.training is missing"),
        ("warmup.training={stepz: 3}", "warmup.training.stepz is no key; did you mean 'steps'"),
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


def test_a_bare_folder_takes_the_place_of_training_a_teacher(tmp_path):
    recipe = load_recipe("digits", [f"teacher={tmp_path}"])
    assert (recipe.teacher.path, recipe.teacher.training) == (str(tmp_path), None)
    recipe = load_recipe("sdxl_dmd2_1step", ["teacher=someone/somewhere", f"data={tmp_path}"])
    assert (recipe.teacher.path, recipe.data.path) == ("someone/somewhere", str(tmp_path))


def test_folders_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    given = ["teacher=teacher", "data=data", "start=student", "warmup=null"]
    recipe = load_recipe("sdxl_dmd2_1step", given)
    found = [recipe.teacher.path, recipe.data.path, recipe.start]
    assert found == [str(tmp_path / name) for name in ("teacher", "data", "student")]


def test_a_bare_name_is_a_choice_without_keys(tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_text((RECIPES / "digits.yaml").read_text().replace("{name: digits}", "digits"))
    assert load_recipe(path) == load_recipe("digits")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("sdxl_dmd2_1step", "start=student", "needs no warmup"),
        ("sdxl_dmd2_1step", "warmup.training.critic={lr: 1}", "warm-up's training has no use"),
        ("sdxl_fdistill", "data={name: labels}", "data labels has no real samples"),
        ("edm_cifar10", "data={name: images}", "data.size is missing"),
        ("pixart_sim", "model.critic_loar=4", "did you mean 'critic_lora'"),
        ("pixart_sim", "model.critic_lora=0", "model.critic_lora is 0"),
    ],
)
def test_a_recipe_of_a_pretrained_teacher_is_checked_as_strictly(name, override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(name, [override])
    assert message in str(error.value)


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
    assert fields <= set(DistributionMatchingMethod.model_fields)
    teacher = DenoiserDescription.of(load_recipe("digits"), (1, 8, 8), 10).build()
    recipe = load_recipe("digits", ["objective.ratio_max=7", "objective.divergence=forward_kl"])
    settings = make_objective(recipe, teacher).settings
    assert (settings.ratio_max, settings.divergence.name) == (7.0, "forward_kl")


def test_another_method_keeps_times_laws_and_guidance():
    recipe = load_recipe("digits", ["objective.divergence=forward_kl", "objective=diff_instruct"])
    before = load_recipe("digits").objective
    assert (recipe.objective.name, recipe.objective.normalise) == ("diff_instruct", False)
    assert recipe.objective.divergence == "reverse_kl"
    assert recipe.objective.student_times == before.student_times
    assert recipe.objective.matching_law == before.matching_law
    with pytest.raises(RecipeError, match="name 'dif_instruct' is unknown; did you mean 'diff_ins"):
        load_recipe("digits", ["objective=dif_instruct"])


def test_every_key_is_documented():
    def sections(model):
        yield model
        for field in model.model_fields.values():
            kinds = getattr(field.annotation, "__args__", (field.annotation,))
            for kind in kinds:
                if isinstance(kind, type) and hasattr(kind, "model_fields"):
                    yield from sections(kind)

    found = set(sections(Recipe))
    assert {TrainingSettings, *METHODS} <= found
    for section in found:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
