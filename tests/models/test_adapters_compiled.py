"""Adapters under torch.compile: no graph break, and whole blocks compiled one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import condition_of, tiny_denoiser

from fastdistill.models.lora import shared_lora_critic

BACKEND = "eager"  # what is tested is tracing


def arguments_of(network: Any) -> tuple[Any, ...]:
    x = torch.randn(2, *network.sample_shape, generator=torch.Generator().manual_seed(2))
    return x.requires_grad_(), torch.tensor([3.0, 700.0]), condition_of(network)


@pytest.mark.parametrize("family", ["dit", pytest.param("flux", marks=pytest.mark.slow)])
def test_a_network_with_features_is_one_graph(family):
    network = tiny_denoiser(family).network.requires_grad_(False)
    arguments = arguments_of(network)
    compiled = torch.compile(network.forward_with_features, backend=BACKEND, fullgraph=True)
    raw, features = compiled(*arguments)
    expected, expected_features = network.forward_with_features(*arguments)
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(features, expected_features)
    assert not raw.requires_grad
    assert features[-1].requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["dit", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_compiled_blocks_serve_teacher_and_shared_critic_in_all_ways(family):
    teacher = tiny_denoiser(family).requires_grad_(False)
    critic = shared_lora_critic(teacher, rank=2)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.1)
    arguments = arguments_of(teacher.network)
    calls = [
        method
        for network in (teacher.network, critic.network)
        for method in (network, network.features, network.forward_with_features)
    ]
    expected = [call(*arguments) for call in calls]
    assert (expected[0] - expected[3]).abs().max() > 1e-3
    for name in teacher.network.block_shapes:
        teacher.network.model.get_submodule(name).compile(backend=BACKEND)
    for call, value in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(*arguments), value)
