"""Score projection, rewards and entropy in the trainer: resume, host, recomputation, plans."""

from __future__ import annotations

import copy

import pytest
import torch
from small import small_recipe
from synchronisation import no_synchronisation
from tiny_models import Prompts, tiny_denoiser

from fastdistill.config import load_recipe
from fastdistill.data import digits
from fastdistill.diffusion import Noise
from fastdistill.engine.checkpoint import CheckpointStore
from fastdistill.engine.cycle import count_cycle
from fastdistill.engine.roles import checkpoint_blocks, make_objective
from fastdistill.engine.saved import DenoiserDescription
from fastdistill.engine.trainer import Trainer
from fastdistill.evaluate import digits_classifier
from fastdistill.models.lora import shared_lora_critic
from fastdistill.objectives import Batch, ScoreProjection, ScoreProjectionMethod

METHODS = {
    "sim": ["objective=sim", "objective.guidance_scale=1.5", "teacher.condition_dropout=0.1"],
    "sida": ["objective=sida", "objective.student_times=[2.5, 0.8]", "training.accumulation=2"],
    "diff_instruct_star": [
        "objective=diff_instruct_star",
        "objective.reward=digits_classifier",
        "objective.reward_weight=0.01",
        "objective.guidance=outside",
        "objective.guidance_scale=1.5",
        "teacher.condition_dropout=0.1",
    ],
    "esd": ["objective=esd"],
}
METHOD = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module", autouse=True)
def _one_classifier():
    """Trained once for all tests."""
    classifier = digits_classifier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdistill.evaluate.digits_classifier", lambda: copy.deepcopy(classifier))
        yield


def trainer(name: str, folder=None) -> Trainer:
    recipe = small_recipe(*METHODS[name])
    data = digits()
    teacher = DenoiserDescription.of(recipe, data.shape, data.classes).build()
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(teacher.network.leave[1].weight, std=0.1, generator=generator)
    store = folder and CheckpointStore(folder, ("distill",), keep=9)
    objective = make_objective(recipe, teacher)
    return Trainer(objective, data, recipe.training, checkpoints=store, stage="distill")


@METHOD
def test_a_step_makes_no_host_synchronisation(name):
    made = trainer(name)
    made.update(), made.update()  # streams and buffers are made on first use
    with no_synchronisation():
        for _ in range(4):
            made.update()


@METHOD
def test_stopping_and_continuing_is_bitwise(tmp_path, name):
    whole = trainer(name)
    for _ in range(6):
        whole.update()
    half = trainer(name, tmp_path)
    for _ in range(3):
        half.update()
    half.save()
    half.checkpoints.wait()
    again = trainer(name, tmp_path)
    again.resume(again.checkpoints.newest())
    for _ in range(3):
        again.update()
    expected, found = whole.objective.state_dict(), again.objective.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def projection(teacher, critic) -> ScoreProjection:
    settings = ScoreProjectionMethod(
        name="score_projection", student_times=(400.0,), guidance_scale=3.0, normalise=True
    )
    student = copy.deepcopy(teacher).requires_grad_(True)
    return ScoreProjection(
        student,
        teacher,
        critic,
        settings.student_times,
        settings.matching_law,
        settings.critic_law,
        settings,
    )


@pytest.mark.parametrize("shared", [False, True], ids=["full critic", "shared LoRA critic"])
def test_recomputed_blocks_give_the_same_gradient(shared):
    """Of student, teacher and critic, of which the latter two pass gradients to their input."""
    gradients = []
    for recomputes in (False, True):
        teacher = tiny_denoiser("pixart")
        made = copy.deepcopy(teacher)
        if shared:
            critic = shared_lora_critic(teacher, rank=2)
            with torch.no_grad():
                for index, value in enumerate(critic.parameters()):
                    torch.manual_seed(index)
                    value.normal_(std=0.1)
        else:
            critic = made.requires_grad_(True)
            with torch.no_grad():
                for value in critic.parameters():
                    value.mul_(1.1)
        objective = projection(teacher, critic)
        if recomputes:
            checkpoint_blocks(objective)
            assert teacher.network.recompute
        critic.requires_grad_(False)
        data = Prompts(teacher)
        batch = Batch(torch.arange(4), Noise(3), 0.25, data.shape, *data.batch(0, 0, 4))
        objective.student_update(batch, objective.generate(batch)).backward()
        assert all(value.grad is None for value in teacher.parameters())
        gradients.append([value.grad for value in objective.student.parameters()])
    assert any(value.abs().sum() > 0 for value in gradients[0] if value is not None)
    torch.testing.assert_close(*gradients)


def test_a_plan_counts_the_passes_through_both_networks():
    """A student's update has graphs of teacher and critic, which pathwise methods have not."""
    kept = {}
    for name in ("dmd", "sid"):
        recipe = load_recipe("digits", [f"objective={name}"])
        with torch.device("meta"):
            teacher = DenoiserDescription.of(recipe, (1, 8, 8), 10).build()
        objective = make_objective(recipe, teacher)

        def inputs(count):
            labels = torch.zeros(count, dtype=torch.int64, device="meta")
            return torch.zeros(count, 1, 8, 8, device="meta"), labels, labels

        cycle = count_cycle(objective, recipe.training, (1, 8, 8), inputs)
        graded = {part.name for part in cycle.parts if part.update == "student" and part.has_graph}
        kept[name] = graded
    assert kept["dmd"] == {"student forward"}
    assert kept["sid"] == {"student forward", "teacher forward", "critic forward"}
