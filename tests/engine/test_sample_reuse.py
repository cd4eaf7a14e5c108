"""`training.sample_reuse`: critic updates that share a generated sample."""

from __future__ import annotations

import pytest
import torch
from small import small_recipe
from test_trainer import ALL_TERMS, assert_bitwise, trainer, weights

from fastdistill.config import RecipeError
from fastdistill.diffusion import Noise

FIVE = "training.critic_updates_per_student_update=5"
REUSE = [*ALL_TERMS, FIVE, "training.accumulation=2", "training.batch_size=16"]


def reusing(count: int, *overrides: str, **options):
    recipe = small_recipe(*REUSE, f"training.sample_reuse={count}", *overrides)
    return trainer(recipe=recipe, **options)


def watch(made) -> dict[str, list]:
    """Steps of all generated samples, and what every critic update was given."""
    seen: dict[str, list] = {"generated": [], "samples": [], "conditions": [], "noise": []}
    generate, critic_update = made.objective.generate, made.objective.critic_update

    def generated(batch):
        seen["generated"].append((batch.noise.step, torch.is_grad_enabled()))
        return generate(batch)

    def updated(batch, sample):
        seen["samples"].append(sample.clone())
        seen["conditions"].append(batch.condition.clone())
        seen["noise"].append(batch.noise.key("critic-noise").clone())
        return critic_update(batch, sample)

    made.objective.generate, made.objective.critic_update = generated, updated
    return seen


@pytest.mark.parametrize(
    ("reuse", "expected"),
    [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3, 4]), (4, [0, 4]), (5, [0, 4])],
)
def test_a_sample_is_generated_for_so_many_critic_updates_and_for_the_students(reuse, expected):
    made = reusing(reuse)
    seen = watch(made)
    for _ in range(10):
        made.update()
    steps = [*expected, *(5 + step for step in expected)]
    # Two micro-batches a step; with a graph on the student's turn alone.
    assert seen["generated"] == [(step, step % 5 == 4) for step in steps for _ in range(2)]


def test_the_same_sample_with_its_condition_gets_new_noise():
    made = reusing(4)
    seen = watch(made)
    for _ in range(5):
        made.update()
    for micro in range(2):
        first, *others = range(micro, 8, 2)  # the critic's four turns
        for other in others:
            assert torch.equal(seen["samples"][other], seen["samples"][first])
            assert torch.equal(seen["conditions"][other], seen["conditions"][first])
            assert not torch.equal(seen["noise"][other], seen["noise"][first])
    assert not torch.equal(seen["samples"][8], seen["samples"][0])  # the student's turn


def test_without_reuse_nothing_changes():
    plain = trainer(recipe=small_recipe(*REUSE))
    one = reusing(1)
    for _ in range(10):
        plain.update(), one.update()
    assert_bitwise(weights(one), weights(plain))


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 7, 8, 11])
def test_a_run_resumed_between_two_samples_is_bitwise_the_uninterrupted_one(tmp_path, stop):
    interval = f"training.checkpoint_every={stop}"
    whole = reusing(3, interval, "training.steps=12", tmp_path=tmp_path)
    whole.fit()
    again = reusing(3, interval, "training.steps=12")
    (found,) = [entry for entry in whole.checkpoints._listed() if entry.step == stop]
    again.resume(found)
    again.fit()
    assert_bitwise(weights(again), weights(whole))


def test_a_run_that_goes_on_generates_nothing_twice(tmp_path):
    made = reusing(4, tmp_path=tmp_path)
    for _ in range(2):
        made.update()
    made.save()
    made.checkpoints.wait()
    again = reusing(4)
    again.resume(made.checkpoints.newest())
    seen = watch(again)
    again.update(), again.update()
    assert [step for step, _ in seen["generated"]] == [0, 0]  # once, at the sample's own step
    assert isinstance(again.noise, Noise)
    assert again.noise.step == 3


def test_a_sample_that_the_student_has_left_behind_is_refused():
    with pytest.raises(RecipeError, match="sample_reuse is 3, but a sample is too old after"):
        small_recipe("training.sample_reuse=3")


def test_dropped_gradients_train_the_same_bit_by_bit():
    options = ("training.accumulation=2", "training.batch_size=16")
    kept = trainer(recipe=small_recipe(*ALL_TERMS, *options))
    dropped = trainer(recipe=small_recipe(*ALL_TERMS, *options, "training.drop_gradients=true"))
    for _ in range(6):
        kept.update(), dropped.update()
    assert all(value.grad is None for value in dropped.arenas["critic"].parameters)
    assert_bitwise(weights(dropped), weights(kept))
