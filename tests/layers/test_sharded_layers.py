"""Accelerated layers under FSDP2, before or after sharding: one process's gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from unet_models import build

from fastdistill.layers import accelerate

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from processes import run_ranks


def sharded_gradients(ranks, name: str, first: bool, resident: bool, largest_unit: int):
    """Whole gradients of a mean over all samples, of which each rank has all."""
    from fastdistill.parallel import shard

    model, inputs, call = build(name)
    model, inputs = model.float(), {key: value.float() for key, value in inputs.items()}
    if first:
        assert accelerate(model).replaced
    shard(model, ranks.mesh(), resident=resident, largest_unit=largest_unit)
    if not first:
        accelerate(model)
    shards = dict(model.named_parameters())  # gathered weights would stand in their place later
    call(model, inputs).square().mean().backward()
    return {key: value.grad.full_tensor() for key, value in shards.items()}


@pytest.mark.parametrize(
    ("name", "first", "resident", "largest_unit"),
    [
        ("sdxl", True, False, 40_000),
        ("residual", True, False, 500),  # its norms are units of their own
        ("block", False, True, 1000),
    ],
)
def test_sharded_gradients_are_those_of_one_process(name, first, resident, largest_unit):
    model, inputs, call = build(name)
    model, inputs = model.float(), {key: value.float() for key, value in inputs.items()}
    call(model, inputs).square().mean().backward()
    for found in run_ranks(2, sharded_gradients, name, first, resident, largest_unit):
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-5)
