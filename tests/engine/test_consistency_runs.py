"""The consistency family in the trainer and in whole runs: resumption, synchronisation, starts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small import small_recipe
from synchronisation import no_synchronisation

from fastdistill.config import RecipeError
from fastdistill.data import digits
from fastdistill.diffusion import Noise
from fastdistill.engine.checkpoint import CheckpointStore
from fastdistill.engine.job import Job
from fastdistill.engine.roles import make_objective
from fastdistill.engine.saved import DenoiserDescription, load_denoiser
from fastdistill.engine.scores import DigitsScores
from fastdistill.engine.trainer import Trainer
from fastdistill.objectives import Batch, DistributionMatching

METHODS = {
    "ect": ["objective=consistency"],
    "ict": ["objective=consistency", "objective.pairs={name: ict}", "objective.source=data"],
    "scd": ["objective=continuous_consistency", "objective.tangent_warmup=15"],
    "sct": [
        *("objective=continuous_consistency", "objective.source=data"),
        *("objective.derivative=finite_differences", "objective.tangent_warmup=15"),
    ],
    "mean_flow": ["objective=mean_flow"],
    "rcm": ["objective=consistency_matching", "objective.tangent_warmup=15"],
}
QUICK = ["training.steps=12", "training.checkpoint_every=5", "training.sample_every=null"]


def trainer(method, tmp_path=None, *options) -> Trainer:
    recipe = small_recipe(*METHODS[method], *QUICK, *options)
    data = digits()
    teacher = DenoiserDescription.of(recipe, data.shape, data.classes).build()
    with torch.no_grad():  # a fresh network's last layer is zero
        generator = torch.Generator().manual_seed(3)
        torch.nn.init.normal_(teacher.network.leave[1].weight, std=0.1, generator=generator)
    store = tmp_path and CheckpointStore(tmp_path, ("distill",), keep=9)
    objective = make_objective(recipe, teacher)
    return Trainer(objective, data, recipe.training, checkpoints=store, stage="distill")


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    tensors, _ = made._state()
    named = {(group, name): value for group in tensors for name, value in tensors[group].items()}
    return {key: value.clone() for key, value in named.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, method):
    """Schedules stand where they would: the checkpoint is within the tangent's warm-up."""
    whole, again = trainer(method, tmp_path), trainer(method)
    start = weights(whole)
    whole.fit()
    (found,) = [entry for entry in whole.checkpoints._listed() if entry.step == 5]
    again.resume(found)
    again.fit()
    mine, theirs = weights(again), weights(whole)
    assert mine.keys() == theirs.keys()
    assert not [key for key in mine if not torch.equal(mine[key], theirs[key])]
    assert any(not torch.equal(start[key], theirs[key]) for key in start if "blocks" in key[1])
    assert not any("teacher" in key[1] or "beside" in key[1] for key in mine)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_makes_no_host_synchronisation(method):
    options = ["objective.guidance_scale=1.5"] if method in ("ect", "scd", "mean_flow") else []
    made = trainer(method, None, *options, "teacher.condition_dropout=0.1")
    made.update(), made.update()  # streams and buffers are made on first use
    with no_synchronisation():
        made.update(), made.update()
    assert made.step == 4


def test_matching_and_consistency_add_their_gradients():
    """The student's gradient is that of either objective alone, the consistency's weighted."""
    made = trainer("rcm", None, "objective.consistency_weight=3").objective
    made.before_step(4)
    with torch.no_grad():  # a critic that equals the teacher has nothing to say
        made.critic.network.leave[1].bias.fill_(0.2)
    data = digits()
    given = data.batch(0, 0, 16)
    batch = Batch(torch.arange(16), Noise(0), 1 / 16, data.shape, *given)

    def gradient(update):
        made.student.zero_grad()
        update.backward()
        return torch.cat([value.grad.flatten() for value in made.student.parameters()]).clone()

    joint = gradient(made.student_update(batch, made.generate(batch)))
    matched = gradient(DistributionMatching.student_update(made, batch, made.generate(batch)))
    weighted = dataclasses.replace(batch, scale=3 / 16)
    held = gradient(made.consistency.student_update(weighted, batch.real))
    assert held.norm() > 0.01 * matched.norm() > 0
    torch.testing.assert_close(joint, matched + held)
    metrics = made.student_update(batch, made.generate(batch)).metrics
    assert {"loss", "score_gap", "consistency_loss", "consistency_tangent"} <= metrics.keys()


def test_a_run_of_mean_flow_leaves_a_student_of_two_times(tmp_path, monkeypatch):
    """It is sampled as any other, and another method can start at it."""
    for name in ("of", "drift"):  # they take seconds
        monkeypatch.setattr(DigitsScores, name, lambda self, *given: {})
    recipe = small_recipe(*METHODS["mean_flow"], *QUICK, "evaluation.samples=100")
    folder = tmp_path / "first"
    assert Job.create(folder, recipe, say=lambda line: None).run() is not None
    teacher, student = (load_denoiser(folder / role) for role in ("teacher", "student"))
    assert (teacher.description.two_times, student.description.two_times) == (False, True)
    assert student.denoiser.network.second.weight.abs().max() > 0
    start = ["objective=dmd", f"start={folder / 'student'}", f"teacher={folder / 'teacher'}"]
    made = make_objective(small_recipe(*start), teacher.denoiser, folder / "student")
    x_t, t, labels = torch.randn(3, 1, 8, 8), torch.full((3,), 2.5), torch.arange(3)
    torch.testing.assert_close(made.student(x_t, t, labels), student.denoiser(x_t, t, labels))
    assert not made.critic.two_times
    again = make_objective(small_recipe(*METHODS["mean_flow"]), teacher.denoiser)
    assert torch.equal(again.student(x_t, t, labels), teacher.denoiser(x_t, t, labels))


def test_methods_that_need_samples_say_so_before_they_start():
    for method in METHODS:
        assert small_recipe(*METHODS[method]).objective.needs_real
    assert small_recipe(*METHODS["rcm"]).objective.trains == ("critic",)
    assert small_recipe(*METHODS["ect"]).objective.trains == ()
    with pytest.raises(RecipeError, match=r"objective\.pairs: name 'ic' is unknown; did you mean"):
        small_recipe(*METHODS["ect"], "objective.pairs={name: ic}")
