"""`accelerate` as a frame: what it finds, what it says, and that undoing it leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdistill
from fastdistill.layers import Patch, accelerate
from fastdistill.layers.accelerate import replace_forward, runs


class Half(nn.Module):
    """A layer that a patch is for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0]))

    def forward(self, value):
        return value * self.weight


class Other(Half):
    """A layer that only looks like it."""

    def forward(self, value):
        return value + self.weight


def _double(self, value):
    return value * self.weight * 2


PATCH = Patch(
    "double",
    "twice the product",
    lambda module: runs(module, Half),
    lambda module: replace_forward(module, _double),
)


@pytest.fixture(autouse=True)
def one_patch(monkeypatch):
    # The module: `fastdistill.layers.accelerate` as an attribute is the function.
    import sys

    module = sys.modules["fastdistill.layers.accelerate"]
    monkeypatch.setattr(module, "patches", lambda: {"double": PATCH})


def test_it_replaces_what_a_patch_knows_and_says_what():
    model = nn.Sequential(Half(), Other(), nn.Sequential(Half()))
    result = fastdistill.accelerate(model)
    assert result.replaced == {"double": 2}
    assert "2 x double: twice the product" in str(result)
    assert repr(result) == "Accelerated(double=2)"
    assert model(torch.ones(1)) == (6 + 3) * 6


def test_a_model_with_nothing_to_replace_is_told_so():
    result = accelerate(nn.Linear(2, 2))
    assert result.replaced == {}
    assert "nothing to accelerate" in str(result)


def test_undo_restores_every_attribute_once():
    model = nn.Sequential(Half(), Half())
    before = [dict(vars(module)) for module in model]
    result = accelerate(model)
    result.undo()
    result.undo()
    assert [dict(vars(module)) for module in model] == before
    assert model(torch.ones(1)) == 9


def test_parameters_hooks_and_keys_stay():
    model = nn.Sequential(Half())
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    parameter, keys = model[0].weight, list(model.state_dict())
    accelerate(model)
    assert model[0].weight is parameter
    assert list(model.state_dict()) == keys
    assert seen == []
    assert model(torch.ones(1)) == 6
    assert seen == [6]


def test_what_is_replaced_already_is_left():
    model = nn.Sequential(Half())
    first = accelerate(model)
    assert accelerate(model).replaced == {}
    first.undo()
    assert model(torch.ones(1)) == 3


def test_a_copy_runs_on_its_own_parameters():
    model = nn.Sequential(Half())
    accelerate(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.fill_(1.0)
    assert model(torch.ones(1)) == 6
    assert other(torch.ones(1)) == 2


def test_it_compiles_as_one_graph():
    model = nn.Sequential(Half())
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)) == 6


@pytest.mark.parametrize("only", [["doubel"], "double"])
def test_unknown_names_are_refused_with_the_list(only):
    with pytest.raises(ValueError, match="expected a list of some of double"):
        accelerate(nn.Sequential(Half()), only=only)
