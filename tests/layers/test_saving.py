"""Values that are made again in the backward pass: when, how often, and from what."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdistill.layers.saving import cheap, layers_of


class Counted:
    """GELU that counts how often it runs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return F.gelu(x)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return [nn.Linear(6, 4) for _ in range(3)]


def run(gelu, x, layers):
    value = cheap(gelu(x), gelu, x)
    return torch.cat(layers_of(value, *layers), dim=-1)


def test_gradients_are_those_of_the_plain_layers(layers):
    x = torch.randn(2, 5, 6, requires_grad=True)
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    plain = torch.cat([layer(F.gelu(x)) for layer in layers], dim=-1).square().sum()
    found = run(F.gelu, x, layers).square().sum()
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_value_is_made_again_once_for_all_layers_of_a_backward_pass(layers):
    gelu = Counted()
    x = torch.randn(2, 5, 6, requires_grad=True)
    loss = run(gelu, x, layers).square().sum()
    assert gelu.calls == 1
    for passes in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert gelu.calls == 1 + passes
    torch.autograd.grad(loss, layers[0].weight, retain_graph=True)
    plain = torch.cat([layer(F.gelu(x)) for layer in layers], dim=-1).square().sum()
    found, expected = (torch.autograd.grad(value, x, retain_graph=True) for value in (loss, plain))
    torch.testing.assert_close(found, expected)


def test_nothing_is_made_again_where_no_weight_has_a_gradient(layers):
    gelu = Counted()
    x = torch.randn(2, 5, 6, requires_grad=True)
    for layer in layers:
        layer.requires_grad_(False)
    run(gelu, x, layers).sum().backward()
    assert gelu.calls == 1
    with torch.no_grad():
        assert run(gelu, x, layers).grad_fn is None


def test_inputs_are_saved_through_the_hooks_around(layers):
    """As offloading and checkpointing need it: nothing holds what these hooks took away."""
    x = torch.randn(2, 5, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, lambda saved: saved):
        inner = x * 2
        held = weakref.ref(inner)
        out = run(F.gelu, inner, layers)
    del inner
    gc.collect()
    assert held() is None
    (found,) = torch.autograd.grad(out.sum(), x)
    (plain,) = torch.autograd.grad(run(F.gelu, x * 2, layers).sum(), x)
    assert torch.equal(found, plain)


def test_the_value_itself_is_not_held(layers):
    x = torch.randn(2, 5, 6, requires_grad=True)
    value = cheap(F.gelu(x), F.gelu, x)
    held = weakref.ref(value)
    out = layers_of(value, *layers)
    del value
    gc.collect()
    assert held() is None
    assert out[0].requires_grad


def test_a_changed_input_is_found_out(layers):
    x = torch.randn(2, 5, 6, requires_grad=True)
    inner = x * 2
    loss = run(F.gelu, inner, layers).sum()
    with torch.no_grad():
        inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
