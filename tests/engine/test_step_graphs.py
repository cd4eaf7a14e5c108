"""Steps from a graph are the eager ones, bit by bit: proved with ops recorded on a CPU."""

from __future__ import annotations

import pytest
import torch
from recorded_steps import RecordedCapture
from small import small_recipe
from synchronisation import no_synchronisation
from test_trainer import ALL_TERMS, assert_bitwise, trainer, weights

from fastdistill.config import load_recipe
from fastdistill.data import RealBatch
from fastdistill.engine import graphs
from fastdistill.engine.graphs import StaticBatch, StepGraphs
from fastdistill.engine.trainer import Trainer

STEPS = 16
OPTIONS = {
    "plain": [],
    "every term, accumulation": [
        *ALL_TERMS,
        "training.accumulation=2",
        "objective.guidance_scale=1.5",
        "teacher.condition_dropout=0.1",
        "training.student.clip_norm=1.0",
    ],
    "sample reuse": [
        *ALL_TERMS,
        "training.critic_updates_per_student_update=4",
        "training.sample_reuse=2",
    ],
    "shared critic forward": [*ALL_TERMS, "objective.share_critic_forward=true"],
    "shared features": [
        *ALL_TERMS,
        "objective.gan_features=critic",
        "objective.share_feature_forward=true",
    ],
    "dropped gradients": ["training.drop_gradients=true", "training.accumulation=2"],
    "two student times": ["objective.student_times=[2.5, 0.8]"],
    "low precision": [
        "training.precision=bfloat16",
        "training.stochastic_rounding=true",
        "training.moments=8bit",
    ],
}


@pytest.fixture
def captures(monkeypatch) -> list[RecordedCapture]:
    """Every `RecordedCapture` that trainers made instead of CUDA graphs."""
    made: list[RecordedCapture] = []

    def make(device, streams):
        made.append(RecordedCapture())
        return made[-1]

    monkeypatch.setattr("fastdistill.engine.trainer.make_capture", make)
    return made


def graphed(*overrides: str, eager: bool = False) -> Trainer:
    """A trainer whose schedules move at every step, so that a baked learning rate shows."""
    schedule = "{lr: 1.0e-3, betas: [0.5, 0.99], schedule: cosine, warmup: 3}"
    rates = [f"training.{role}={schedule}" for role in ("student", "critic", "discriminator")]
    sizes = ["training.batch_size=16", f"training.steps={STEPS}", "training.log_every=100"]
    recipe = small_recipe(*rates, *sizes, *overrides, "training.cuda_graph=true")
    made = trainer(recipe=recipe)
    if eager:
        made._graphs = StepGraphs(_Eager())
    return made


class _Eager:
    """No graphs: every step is run as it is."""

    def warm_up(self, step) -> None:
        step()

    def capture(self, step):
        return step


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_replayed_steps_are_the_eager_ones_bit_by_bit(captures, options):
    replayed, eager = graphed(*options), graphed(*options, eager=True)
    for _ in range(STEPS):
        replayed.update()
        eager.update()
    events = captures[0].events
    assert events.count("replay") > STEPS / 3
    assert events.count("warm-up") + events.count("replay") == STEPS
    assert_bitwise(weights(replayed), weights(eager))
    assert replayed.metrics.read() == eager.metrics.read()


def test_each_kind_of_step_has_one_graph(captures):
    made = graphed("training.critic_updates_per_student_update=4", "training.sample_reuse=3")
    for _ in range(STEPS):
        made.update()
    # Generated and reused samples of the critic's turns, and the student's turn.
    assert captures[0].events.count("capture") == 3
    assert captures[0].events.count("warm-up") == 3 * graphs.WARM_UP


def test_a_number_of_the_host_that_changes_is_caught(captures):
    """The proof above would see what a graph must not bake in."""
    replayed, eager = graphed(), graphed(eager=True)
    for made in (replayed, eager):
        original = made.objective.critic_update

        def baked(batch, sample, made=made, original=original):
            update = original(batch, sample)
            pairs = [(raw, cotangent * (1 + made.step)) for raw, cotangent in update.pairs]
            return update.__class__(pairs, update.metrics)

        made.objective.critic_update = baked
        for _ in range(STEPS):
            made.update()
    with pytest.raises(AssertionError):
        assert_bitwise(weights(replayed), weights(eager))


def test_learning_rates_are_those_of_the_host_up_to_rounding(captures):
    plain = graphed(eager=True)
    plain.optimizers["critic"]._rate = None
    device = graphed(eager=True)
    for _ in range(8):
        plain.update(), device.update()
    rates = [made.optimizers["critic"].optimizer.param_groups[0]["lr"] for made in (plain, device)]
    assert isinstance(rates[1], torch.Tensor)
    assert float(rates[1]) == pytest.approx(rates[0], rel=1e-6)
    assert rates[0] < 1e-3


def test_a_step_keeps_every_address_and_waits_for_nothing(captures):
    made = graphed(*OPTIONS["every term, accumulation"])
    made.update(), made.update()

    def places() -> list[int]:
        held = [value for arena in made.arenas.values() for value in arena.ranges.values()]
        held += [p for arena in made.arenas.values() for p in arena.parameters]
        held += [p.grad for arena in made.arenas.values() for p in arena.parameters]
        held += [made.noise._table, *made.metrics._sums.values(), *made._kept.values()]
        for batch in made._batches:
            held += [batch.real, batch.condition, batch.uncondition, batch.index]
        return [value.data_ptr() for value in held]

    before = places()
    with no_synchronisation():
        for _ in range(6):
            made.update()
    assert places() == before


def test_a_resumed_run_starts_with_new_graphs(captures, tmp_path):
    whole = graphed()
    for _ in range(STEPS):
        whole.update()
    again = graphed()
    for _ in range(10):
        again.update()
    tensors = {name: value.clone() for name, value in weights(again).items()}
    before = captures[1].events.count("capture")
    store = trainer(tmp_path).checkpoints
    again.checkpoints = store
    again.save()
    store.wait()
    again.resume(store.newest())
    assert_bitwise(weights(again), tensors)
    for _ in range(STEPS - 10):
        again.update()
    assert captures[1].events.count("capture") == 2 * before
    assert_bitwise(weights(again), weights(whole))


def test_sampling_between_steps_changes_nothing(captures):
    """Averaged weights are shown to the network and taken away, at the same addresses."""
    plain, sampled = graphed(), graphed()
    for _ in range(STEPS):
        plain.update(), sampled.update()
        with sampled.averaged() as student:
            student(torch.zeros(2, 1, 8, 8), torch.full((2,), 2.5), torch.zeros(2).long())
    assert_bitwise(weights(sampled), weights(plain))


def test_batches_come_to_one_place():
    held = StaticBatch()
    first, second = (
        RealBatch(torch.full((2, 3), x), {"a": torch.full((2,), x)}) for x in (1.0, 2.0)
    )
    taken = held.take(first)
    again = held.take(second)
    assert again is taken
    assert taken.samples.data_ptr() != first.samples.data_ptr()
    assert torch.equal(taken.samples, second.samples)
    assert torch.equal(taken.condition["a"], second.condition["a"])
    assert taken.uncondition is None
    with pytest.raises(ValueError, match="needs batches of one form"):
        held.take(RealBatch(torch.zeros(3, 3), first.condition))
    with pytest.raises(ValueError, match="needs batches of one form"):
        held.take(RealBatch(torch.zeros(2, 3), {"b": torch.zeros(2)}))


def test_where_there_are_no_graphs_they_are_refused():
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device, but the run is on cpu"):
        trainer(recipe=small_recipe("training.cuda_graph=true"))


def test_graphs_are_off_unless_asked_for():
    assert not load_recipe("digits").training.cuda_graph
