"""A distillation is the same in every mode and over any number of ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from small_training import Setup, make_trainer, train, whole_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.parallel import Ranks

THREE = ("training.accumulation=3", "training.batch_size=8")


def assert_same_training(found, expected) -> None:
    """Losses and weights agree to the rounding of sums in another order."""
    (rows, state), (expected_rows, expected_state) = found, expected
    for row, wanted in zip(rows, expected_rows, strict=True):
        for name in ("student/loss", "critic/loss", "critic/discriminator_loss"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), (name, row["step"])
    assert state.keys() == expected_state.keys()
    for name, wanted in expected_state.items():
        bound = 1e-4 * float(wanted.abs().amax()) + 1e-9 if wanted.numel() else 0.0
        assert float((state[name] - wanted).abs().amax()) <= bound, name


@pytest.fixture(scope="module")
def alone():
    """The run of one process, by accumulation."""
    return {overrides: train(Ranks(), Setup(overrides=overrides)) for overrides in ((), THREE)}


@pytest.mark.parametrize(
    ("size", "setup"),
    [
        (2, Setup("resident")),
        (4, Setup("resident")),
        (2, Setup("fsdp")),
        (4, Setup("fsdp")),
        (2, Setup("fsdp", overrides=THREE)),
        (4, Setup("resident", shards=2, overrides=THREE)),
    ],
    ids=["resident-2", "resident-4", "fsdp-2", "fsdp-4", "fsdp-2-accumulating", "hsdp-2x2"],
)
def test_two_hundred_steps_are_those_of_one_process(alone, size, setup):
    results = run_ranks(size, train, setup)
    assert_same_training(results[0], alone[setup.overrides])
    for rows, state in results[1:]:
        assert all(torch.equal(state[name], value) for name, value in results[0][1].items())
        assert rows == results[0][0]


@pytest.mark.parametrize("mode", ["resident", "fsdp"])
def test_a_sharded_teacher_and_recomputed_blocks_change_nothing(mode):
    expected = run_ranks(2, train, Setup(mode, steps=10))[0]
    found = run_ranks(2, train, Setup(mode, steps=10, shards_teacher=True, recomputes=True))[0]
    assert_same_training(found, expected)


def test_a_gan_on_the_critics_features_is_the_same_in_every_mode():
    """The student's gradient passes through the critic, whose weights it must leave alone."""
    features = ("objective.gan_features=critic", "objective.gan_weight=0.1")
    expected = train(Ranks(), Setup(steps=30, overrides=features))
    for mode in ("resident", "fsdp"):
        found = run_ranks(2, train, Setup(mode, steps=30, overrides=features))[0]
        assert_same_training(found, expected)


def test_gradients_through_a_sharded_teacher_are_the_same_in_every_mode():
    """SiDA: the student's gradient passes through teacher and critic, whose weights it leaves."""
    method = ("objective=sida", "objective.critic_condition_dropout=0.3")
    expected = train(Ranks(), Setup(steps=10, overrides=method))
    for mode in ("resident", "fsdp"):
        setup = Setup(mode, steps=10, overrides=method, shards_teacher=True, recomputes=True)
        assert_same_training(run_ranks(2, train, setup)[0], expected)


def refused_rounding(ranks: Ranks) -> None:
    options = ("training.precision=bfloat16", "training.stochastic_rounding=true")
    with pytest.raises(ValueError, match="stochastic_rounding is for one process"):
        make_trainer(ranks, Setup("resident", overrides=options))


def test_options_and_batches_that_ranks_cannot_have_are_refused():
    run_ranks(2, refused_rounding)
    run_ranks(2, refused_batch)


def refused_batch(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="batch_size is 15, which 2 ranks cannot share equally"):
        make_trainer(ranks, Setup("fsdp", overrides=("training.batch_size=15",)))


LOW = ("training.precision=bfloat16", "training.moments=8bit")


@pytest.mark.parametrize("mode", ["resident", "fsdp"])
def test_bfloat16_networks_with_8_bit_moments_follow_float32_ones(mode):
    """The weights are where float32 training takes them, up to a share of the way they went."""
    start = whole_state(make_trainer(Ranks(), Setup()))
    _, exact = train(Ranks(), Setup(steps=60))
    _, low = run_ranks(2, train, Setup(mode, steps=60, overrides=LOW))[0]
    name = "networks/critic.network.blocks.2.inner.weight"
    way = (exact[name] - start[name]).norm()
    assert (low[name] - exact[name]).norm() < 0.5 * way


def test_a_run_repeats_bit_by_bit():
    setup = Setup("resident", steps=30)
    first, second = (run_ranks(2, train, setup)[0] for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(second[1][name], value) for name, value in first[1].items())


def drawn(ranks: Ranks, setup: Setup) -> tuple[list[Tensor], list[Tensor]]:
    """Real samples and noise of a few steps, of all ranks in the order of samples."""
    trainer = make_trainer(ranks, setup)
    real, noise = [], []
    for step in range(3):
        trainer.step = step
        trainer.noise.at(step)
        for micro in range(3):
            batch = trainer._batch(micro)
            real.append(ranks.gather(batch.real))
            noise.append(ranks.gather(batch.noise.normal("latents", batch.index, (4,))))
    return real, noise


def test_data_and_noise_of_a_sample_do_not_depend_on_the_number_of_ranks():
    expected = drawn(Ranks(), Setup(overrides=THREE))
    for found in run_ranks(4, drawn, Setup("resident", overrides=THREE)):
        for mine, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


class Collectives(TorchDispatchMode):
    """Counts what ranks exchange, by the name of the exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def exchanges(ranks: Ranks, setup: Setup) -> dict[str, int]:
    """What ranks exchange in one cycle of five critic updates and one of the student."""
    trainer = make_trainer(ranks, setup)
    for _ in range(5):
        trainer.update()
    assert {len(trainer.arenas[role]._modules) for role in ("student", "critic")} == {UNITS}
    with Collectives() as mode:
        for _ in range(5):
            trainer.update()
    return dict(mode.counts)


UNITS = 2


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resident_weights_are_gathered_six_times_a_cycle(accumulation):
    """Each of six updates gathers and reduces a network once, and adds up one norm."""
    overrides = (
        "objective.divergence=reverse_kl",
        "objective.gan_weight=0.0",
        f"training.accumulation={accumulation}",
    )
    counts = run_ranks(2, exchanges, Setup("resident", overrides=overrides))[0]
    assert counts == {
        "_allgather_base_": 6 * UNITS,
        "_reduce_scatter_base_": 6 * UNITS,
        "allreduce_": 6,
    }


def test_fsdp_gathers_for_every_forward_and_backward():
    """A unit for each of the student's 5 forwards and a backward, the critic's 6 and 5; the root,
    which stays gathered until its network is updated, once an update."""
    overrides = ("objective.divergence=reverse_kl", "objective.gan_weight=0.0")
    counts = run_ranks(2, exchanges, Setup("fsdp", overrides=overrides))[0]
    assert counts == {"_allgather_base_": 17 + 6, "_reduce_scatter_base_": 12, "allreduce_": 6}
    kept = Setup("fsdp", overrides=overrides, resident_roles=("student",))
    counts = run_ranks(2, exchanges, kept)[0]
    assert counts["_allgather_base_"] == 12 + 6


MODES = {
    "single-1": (1, Setup(steps=24)),
    "resident-2": (2, Setup("resident", steps=24)),
    "fsdp-4": (4, Setup("fsdp", shards=2, steps=24)),
}


def save_halfway(ranks: Ranks, setup: Setup, folder: Path) -> None:
    trainer = make_trainer(ranks, setup, folder)
    for _ in range(setup.steps // 2):
        trainer.update()
    trainer.save()
    trainer.fit()  # the checkpoint is written beside further steps
    newest = trainer.checkpoints.newest()
    assert newest.step == setup.steps


def continue_from(ranks: Ranks, setup: Setup, folders: list[Path]) -> list[dict[str, Tensor]]:
    """The end of the run, from the checkpoint halfway in each folder."""
    states = []
    for folder in folders:
        trainer = make_trainer(ranks, setup, folder)
        halfway = next(found for found in trainer.checkpoints._listed() if found.step < setup.steps)
        trainer.resume(halfway)
        trainer.checkpoints = None
        trainer.fit()
        states.append(whole_state(trainer))
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A run's folder of checkpoints from each mode."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MODES}
    for name, (size, setup) in MODES.items():
        in_ranks(size, save_halfway, setup, folders[name])
    return folders


def in_ranks(size: int, function, *args):
    return [function(Ranks(), *args)] if size == 1 else run_ranks(size, function, *args)


@pytest.mark.parametrize("loading", MODES)
def test_a_checkpoint_of_every_mode_continues_in_every_other(saved, loading):
    size, setup = MODES[loading]
    _, expected = train(Ranks(), MODES["single-1"][1])
    states = in_ranks(size, continue_from, setup, list(saved.values()))[0]
    for state in states:
        assert_same_training(([], state), ([], expected))
    own = states[list(MODES).index(loading)]
    (_, uninterrupted), *_ = in_ranks(size, train, setup)
    assert all(torch.equal(own[name], value) for name, value in uninterrupted.items())
