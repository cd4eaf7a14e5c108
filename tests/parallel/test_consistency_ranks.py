"""The consistency family is the same over two ranks, in the modes that its derivatives work in."""

from __future__ import annotations

import pytest
import torch
from processes import run_ranks
from small_training import LARGEST_UNIT, RECIPE, whole_state
from torch import Tensor

from fastdistill.config import load_recipe
from fastdistill.data import digits
from fastdistill.engine.roles import make_objective
from fastdistill.engine.saved import DenoiserDescription
from fastdistill.engine.trainer import Trainer
from fastdistill.parallel import Mode, Parallel, Ranks

METHODS = {
    "ect": ("objective=consistency",),
    "scd": ("objective=continuous_consistency", "objective.tangent_warmup=4"),
    "mean_flow": ("objective=mean_flow", "objective.derivative=finite_differences"),
}


def train(ranks: Ranks, mode: Mode, method: str) -> tuple[float, dict[str, Tensor]]:
    """The last loss, and the whole state."""
    options = ["training.steps=8", "training.log_every=8", "training.batch_size=16"]
    recipe = load_recipe("digits", [*RECIPE[:3], *METHODS[method], *options])
    teacher = DenoiserDescription.of(recipe, (1, 8, 8), 10).build()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        torch.nn.init.normal_(teacher.network.leave[1].weight, std=0.1, generator=generator)
    rows: list[dict] = []
    trainer = Trainer(
        make_objective(recipe, teacher),
        digits(),
        recipe.training,
        parallel=Parallel(ranks, mode, None, LARGEST_UNIT),
        on_log=rows.append,
    )
    trainer.fit()
    return rows[-1]["student/loss"], whole_state(trainer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mode"), [("scd", "resident"), ("ect", "fsdp"), ("mean_flow", "fsdp")]
)
def test_two_ranks_train_as_one(method, mode):
    expected_loss, expected = train(Ranks(), "single", method)
    loss, state = run_ranks(2, train, mode, method)[0]
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert state.keys() == expected.keys()
    for name, wanted in expected.items():
        if name.startswith(("networks", "ema")):
            difference = float((state[name] - wanted).abs().amax())
            assert difference <= 1e-3 * float(wanted.abs().amax()) + 1e-6, name
