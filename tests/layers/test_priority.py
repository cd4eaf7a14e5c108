"""cuDNN's attention first: for the marked modules, on GPUs, and not a call longer."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from token_models import build, outputs
from torch import nn

from fastdistill.layers import accelerate, priority
from fastdistill.layers.priority import ORDER, in_order, priority_of

CUDNN = int(ORDER[0])


def order():
    return torch._C._get_sdp_priority_order()


class OnGpu:
    """As much of a tensor as the choice looks at."""

    is_cuda = True


@pytest.mark.parametrize("cheap", [True, False])
def test_the_order_is_cudnn_first_inside_and_as_before_behind(cheap, monkeypatch):
    before = order()
    assert before[0] != CUDNN
    if not cheap:  # a torch without the function that sets the order
        monkeypatch.setattr(priority, "_cheaply_in_order", lambda: pytest.fail("taken"))
        monkeypatch.setattr(priority, "hasattr", lambda *args: False, raising=False)
    with contextlib.suppress(KeyError), in_order():
        assert order()[:4] == [int(backend) for backend in ORDER]
        assert sorted(order()) == sorted(before)
        raise KeyError
    assert order() == before


def test_it_is_for_marked_modules_on_gpus_alone():
    module, value = nn.Module(), torch.zeros(1)
    before = order()
    with priority_of(module, OnGpu()):
        assert order() == before
    vars(module)[priority._MARK] = True
    with priority_of(module, value):
        assert order() == before
    with priority_of(module, OnGpu()):
        assert order()[0] == CUDNN


@pytest.mark.parametrize("name", ["dit_block", "pixart_block", "sd35_block_dual", "flux_block"])
def test_every_patched_attention_asks(name, monkeypatch):
    built, asked = build(name), []
    count = accelerate(built.module).replaced["attention_priority"]

    def ask(attn, q):
        asked.append(priority._MARK in vars(attn))
        return contextlib.nullcontext()

    for file in ("tokens", "joint"):
        monkeypatch.setattr(f"fastdistill.layers.{file}.priority_of", ask)
    outputs(built.module, built.inputs | built.constants)
    assert asked == [True] * count


def test_the_patch_is_for_patched_attention_and_undone():
    built = build("dit_block")
    assert accelerate(built.module, only=["attention_priority"]).replaced == {}
    accelerated = accelerate(built.module)
    assert priority._MARK in vars(built.module.attn1)
    accelerated.undo()
    assert priority._MARK not in vars(built.module.attn1)


def test_it_compiles_as_one_graph():
    def attend(q, k, v):
        with in_order():
            return F.scaled_dot_product_attention(q, k, v)

    q = torch.randn(1, 2, 5, 8)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, q, q), F.scaled_dot_product_attention(q, q, q))
