"""The page docs/drop-in.md: every diff applies to its loop, runs, and trains the same weights."""

from __future__ import annotations

import pytest
import torch

from bench import dropin
from bench.counting import Counting
from bench.dropin_page import CHANGES, LOOPS, blocks, program
from bench.dropin_page import _apply as apply

DIFFS = [(loop, *changes) for loop in LOOPS for changes in (*((one,) for one in CHANGES), CHANGES)]
TRAINED = {"diffusers": ("unet",), "dmd2": ("student", "critic")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights of what a program trained, in two cycles."""
    home, done = tmp_path_factory.mktemp("page"), {}

    def train(loop, *changes):
        if (loop, changes) not in done:
            variant = dropin.Variant(loop, "+".join(changes), program(loop, *changes))
            _, scope = dropin.run(variant, home, True, 1, None)
            weights = {
                f"{role}.{name}": value.detach().clone()
                for role in TRAINED[loop]
                for name, value in scope[role].state_dict().items()
            }
            done[loop, changes] = (weights, scope)
        return done[loop, changes]

    return train


@pytest.mark.parametrize("diff", DIFFS, ids="-".join)
def test_a_diff_changes_the_loop_and_not_what_it_trains(trained, diff):
    loop, *changes = diff
    before, after = trained(loop)[0], trained(loop, *changes)[0]
    assert program(loop, *changes) != program(loop)
    start = dropin.make_pipeline(trained(loop)[1]["folder"], True).unet.state_dict()
    role = TRAINED[loop][0]
    change = torch.cat(
        [(before[f"{role}.{name}"] - value).flatten() for name, value in start.items()]
    )
    off = torch.cat([(after[f"{role}.{n}"] - before[f"{role}.{n}"]).flatten() for n in start])
    assert change.norm() > 0, "the loop trains"
    # AdamW turns the rounding of a gradient near zero into a step of either sign.
    assert off.norm() < 0.02 * change.norm()


@pytest.mark.parametrize("loop", LOOPS)
def test_the_average_is_that_of_the_loop(trained, loop):
    ema = trained(loop)[1]["ema"]
    optimizer = trained(loop, "optimizer")[1]["optimizer"]
    role = TRAINED[loop][0]
    network = trained(loop, "optimizer")[1][role]
    with optimizer.averaged():
        found = [parameter.detach().clone() for parameter in network.parameters()]
    for one, other in zip(found, ema.shadow_params, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_trainers_program_runs(tmp_path, loop):
    scope = {"pipe": dropin.make_pipeline(tmp_path / "pipeline", True), "print": lambda *_: None}
    scope |= {"folder": tmp_path / "pipeline", "null": torch.zeros(1, dropin.TOKENS, dropin.WIDTH)}
    data = dropin.Prompts(loop == "diffusers")
    scope |= {"prompts": data, "samples": data, "output": tmp_path / "run"}
    exec(compile(blocks()["trainer", loop], f"trainer of {loop}", "exec"), scope)
    assert scope["trainer"].loop.step == 10
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
    if loop == "dmd2":
        assert scope["latents"].isfinite().all()


def test_a_diff_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="diff loss of dmd2: the loop has no line 'b = 2'"):
        apply("a = 1\n", "-b = 2\n+b = 3\n", "loss of dmd2")
    assert apply("a = 1\nb = 2\nc = 3\n", " a = 1\n-b = 2\n+b = 4\n", "") == "a = 1\nb = 4\nc = 3\n"


def test_counting_sees_launches_and_the_peak():
    before = torch.ones(1000)
    with Counting() as counting:
        kept = before + 1
        for _ in range(3):
            (kept * 2).view(10, 100).sum()
    assert counting.operators == {"add": 1, "mul": 3, "sum": 3}
    assert counting.launches == 7
    assert 8000 <= counting.peak <= 8000 + 16
    assert counting.live == 4000


def test_the_fused_gradient_is_the_chains_in_exact_arithmetic_and_closer_to_it_in_bfloat16():
    chain, fused = dropin.gradient_errors()
    assert fused < 0.005 < chain


def test_the_bench_measures_in_turns_and_reports(tmp_path, monkeypatch):
    known = dropin.variants()
    assert [one.name for one in known[:6]] == ["as it was", *CHANGES, "all three", "trainer"]
    chosen = [one for one in known if one.loop == "dmd2" and one.name in ("as it was", "all three")]
    monkeypatch.setattr(dropin, "variants", lambda: chosen)
    monkeypatch.setattr(dropin, "LOOPS", ("dmd2",))
    found = dropin.measure(tmp_path, True, 1, 1, lambda line: None)
    before, after = found["dmd2", "as it was"], found["dmd2", "all three"]
    assert after.launches < before.launches
    page = dropin.report(found, 10**6)
    assert f"| all three | {after.seconds / before.seconds:.2f} |" in page
