"""The trainer: counted updates, bitwise resume, no host synchronisation, and bad weather."""

from __future__ import annotations

import copy
import os
import re
import signal

import pytest
import torch
from small import small_recipe
from synchronisation import no_synchronisation

from fastdistill.data import InMemoryData, digits
from fastdistill.diffusion import LogNormalSigma
from fastdistill.engine.checkpoint import CheckpointStore
from fastdistill.engine.roles import make_objective
from fastdistill.engine.saved import DenoiserDescription
from fastdistill.engine.trainer import Interrupted, Trainer, TrainingDivergedError
from fastdistill.objectives import Denoising

ALL_TERMS = ["objective.divergence=jensen_shannon", "objective.gan_weight=0.01"]


def trainer(tmp_path=None, data=None, *, recipe=None, **options) -> Trainer:
    recipe = recipe or small_recipe(*ALL_TERMS)
    data = data or digits()
    teacher = DenoiserDescription.of(recipe, data.shape, data.classes).build()
    with torch.no_grad():  # a fresh network's last layer is zero: give the scores something to say
        torch.nn.init.normal_(teacher.network.leave[1].weight, std=0.1, generator=_generator())
    store = tmp_path and CheckpointStore(tmp_path, ("distill",), keep=9)
    return Trainer(
        make_objective(recipe, teacher),
        data,
        recipe.training,
        checkpoints=store,
        stage="distill",
        **options,
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    tensors, _ = made._state()
    return copy.deepcopy(
        {f"{group}/{name}": value for group in tensors for name, value in tensors[group].items()}
    )


def assert_bitwise(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different


def test_five_critic_updates_per_student_update_means_five():
    made = trainer(recipe=small_recipe("training.critic_updates_per_student_update=5"))
    made.fit()
    steps = {role: step.optimizer.counts["step"] for role, step in made.optimizers.items()}
    assert steps == {"student": 8, "critic": 40}
    assert made.student_updates == 8


def test_the_average_moves_only_with_the_student():
    made = trainer()
    before = made.averaged_weights()
    before = copy.deepcopy(before)
    made.update()  # the first of two is the critic's alone
    assert_bitwise(made.averaged_weights(), before)
    made.update()
    assert not torch.equal(
        made.averaged_weights()["network.enter.weight"], before["network.enter.weight"]
    )


def test_the_averaged_student_is_shown_and_taken_away():
    made = trainer()
    for _ in range(6):
        made.update()
    student, own = made.objective.student, copy.deepcopy(made.objective.student.state_dict())
    with made.averaged() as shown:
        assert shown is student
        assert not shown.training
        assert_bitwise(shown.state_dict(), made.averaged_weights())
    assert student.training
    assert_bitwise(student.state_dict(), own)


def test_every_step_draws_new_noise_and_new_data():
    made, rows = trainer(), []
    original = made.objective.generate
    made.objective.generate = lambda batch: rows.append(batch) or original(batch)
    samples = []
    for _ in range(3):
        made.update()
        batch = rows[-1]
        samples.append((batch.noise.normal("latents", batch.index, (4,)), batch.real))
    for first, second in ((0, 1), (1, 2)):
        assert not torch.equal(samples[first][0], samples[second][0])
        assert not torch.equal(samples[first][1], samples[second][1])


def test_the_students_turn_leaves_no_gradient_in_the_critic():
    """The GAN term passes through the critic's features on its way to the student."""
    made = trainer(recipe=small_recipe(*ALL_TERMS, "objective.gan_features=critic"))
    batch = made._batch(0)
    made._accumulate(
        "student", made.objective.student_update, batch, made.objective.generate(batch)
    )
    for module in made.objective.critic_modules().values():
        assert all(not value.grad.any() for value in module.parameters())
        assert all(value.requires_grad for value in module.parameters())
    assert made.objective.student.network.enter.weight.grad.norm() > 0


@pytest.mark.parametrize("stop", [8, 16, 24])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, stop):
    rows, resumed_rows = [], []
    whole = trainer(tmp_path, on_log=rows.append)
    whole.fit()
    again = trainer(on_log=resumed_rows.append)
    store = whole.checkpoints
    (found,) = [entry for entry in store._listed() if entry.step == stop]
    again.resume(found)
    assert again.step == stop
    again.fit()
    assert_bitwise(weights(again), weights(whole))
    assert resumed_rows == [row for row in rows if row["step"] > stop]


def test_accumulation_of_two_halves_is_one_batch_up_to_rounding():
    """The samples are told apart by their global index, so the noise is the same."""
    gradients = []
    for accumulation, size in ((1, 32), (2, 16)):
        recipe = small_recipe(
            f"training.accumulation={accumulation}", f"training.batch_size={size}"
        )
        made = trainer(recipe=recipe)
        with torch.no_grad():  # a critic that equals the teacher has nothing to say
            made.objective.critic.network.leave[1].bias.fill_(0.2)
        made.noise.at(0)
        for micro in range(accumulation):
            batch = made._batch(micro)
            sample = made.objective.generate(batch)
            made._accumulate("student", made.objective.student_update, batch, sample)
        gradients.append(made.objective.student.network.leave[1].weight.grad.clone())
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-7)


def run_without_synchronisation(made: Trainer, steps: int) -> None:
    with no_synchronisation():
        for _ in range(steps):
            made.update()


@pytest.mark.parametrize("features", ["teacher", "critic"])
def test_a_step_makes_no_host_synchronisation(features):
    recipe = small_recipe(
        *ALL_TERMS,
        f"objective.gan_features={features}",
        "objective.student_times=[2.5, 0.8]",
        "objective.guidance_scale=1.5",
        "teacher.condition_dropout=0.1",
        "training.student.clip_norm=1.0",
        "training.accumulation=2",
    )
    made = trainer(recipe=recipe)
    made.update(), made.update()  # streams and buffers are made on first use
    run_without_synchronisation(made, 4)
    assert made.step == 6


@pytest.mark.parametrize(
    "read",
    [
        lambda update: update.pairs[0][0].sum().item(),
        lambda update: bool((update.pairs[0][1] > 0).any()),
        lambda update: update.pairs[0][1][update.pairs[0][1] > 0],
        lambda update: update.metrics["loss"].tolist(),
        lambda update: torch.equal(*update.pairs[0]),
        lambda update: update.metrics["loss"].cpu(),
    ],
    ids=["item", "bool", "boolean index", "tolist", "equal", "cpu"],
)
def test_an_added_synchronisation_is_caught(read):
    made = trainer()
    made.update(), made.update()
    original = made.objective.critic_update

    def synchronising(batch, sample):
        update = original(batch, sample)
        read(update)
        return update

    made.objective.critic_update = synchronising
    with pytest.raises(AssertionError, match="host synchronisation"):
        run_without_synchronisation(made, 1)


def test_an_update_that_is_not_finite_is_skipped_on_the_device():
    made = trainer()
    made.update(), made.update()
    before = weights(made)
    with torch.no_grad():
        made.objective.teacher.network.enter.bias.fill_(float("nan"))
        made.objective.critic.network.enter.bias.fill_(float("nan"))
    made.update(), made.update()
    after = weights(made)
    kept = [name for name in before if name.startswith(("networks/student.", "ema/"))]
    kept += [name for name in before if re.match("optimizer-student/.*exp_avg", name)]
    for name in kept:
        assert torch.equal(after[name], before[name]), name
    assert after["optimizer-student/skipped"] == 1


def test_training_without_one_finite_update_stops_with_advice():
    made = trainer()
    with torch.no_grad():
        made.objective.student.network.enter.bias.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match="lower the learning rate"):
        made.fit()


def test_nan_and_empty_data_are_refused():
    samples = torch.zeros(5, 1, 8, 8)
    samples[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="in 1 of 5 samples, the first at index 3"):
        InMemoryData(samples)
    with pytest.raises(ValueError, match="is empty"):
        InMemoryData(torch.zeros(0, 1, 8, 8))
    with pytest.raises(ValueError, match="labels have shape"):
        InMemoryData(torch.zeros(5, 1, 8, 8), torch.zeros(4, dtype=torch.int64))


def test_every_sample_is_visited_once_an_epoch():
    data = InMemoryData(torch.arange(10.0).view(10, 1))
    seen = torch.cat([data.batch(0, step, 4).samples for step in range(5)]).flatten()
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(data.batch(0, 0, 25).samples[:20].flatten(), seen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_with_a_checkpoint(tmp_path, number):
    made = trainer(tmp_path)
    made.on_log = lambda row: os.kill(os.getpid(), number) if row["step"] == 14 else None
    with pytest.raises(Interrupted, match="at step 14"):
        made.fit()
    assert made.checkpoints.newest().step == 14


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    made = trainer(tmp_path)
    made.save()
    other = trainer(recipe=small_recipe(*ALL_TERMS, "model.width=48"))
    with pytest.raises(ValueError, match="is of other networks"):
        other.resume(made.checkpoints.newest())


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    made = trainer(tmp_path)
    made.save()
    student = DenoiserDescription.of(small_recipe(), (1, 8, 8), 10).build()
    objective = Denoising(student, LogNormalSigma())
    other = Trainer(objective, digits(), made.settings, stage="distill")
    with pytest.raises(ValueError, match="is of objective DistributionMatching, but this run's is"):
        other.resume(made.checkpoints.newest())


LOW = ["training.precision=bfloat16", "training.stochastic_rounding=true", "training.moments=8bit"]


def test_bfloat16_networks_have_float32_masters():
    made = trainer(recipe=small_recipe(*ALL_TERMS, LOW[0]))
    made.fit()
    assert all(torch.isfinite(value).all() for value in weights(made).values())
    student = made.objective.student.network.enter.weight
    master = made._state()[0]["networks"]["student.network.enter.weight"]
    assert (student.dtype, master.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(student, master.bfloat16())


@pytest.mark.parametrize("options", [LOW[:1], LOW], ids=["masters", "8-bit, stochastic"])
def test_a_resumed_low_precision_run_is_bitwise_the_uninterrupted_one(tmp_path, options):
    recipe = small_recipe(*ALL_TERMS, *options, "training.steps=16")
    whole, again = trainer(tmp_path, recipe=recipe), trainer(recipe=recipe)
    whole.fit()
    (found,) = [entry for entry in whole.checkpoints._listed() if entry.step == 8]
    again.resume(found)
    again.fit()
    assert_bitwise(weights(again), weights(whole))


def test_a_network_without_layers_to_accelerate_is_refused():
    recipe = small_recipe("training.accelerate=true")
    with pytest.raises(ValueError, match="student's DigitsNetwork has no layer that"):
        trainer(recipe=recipe)
