"""Accelerated transformers under FSDP2 and in an arena, before and after they are wrapped."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from token_models import build, outputs

from fastdistill.layers import accelerate
from fastdistill.layers.embedders import _is_one_batch
from fastdistill.optim import ArenaAdamW


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def floats(built):
    return {key: value.float() for key, value in built.inputs.items()} | built.constants


def backward(module, inputs):
    """Outputs, with gradients left in the parameters."""
    results = outputs(module, inputs)
    sum(value.square().sum() for value in results).backward()
    return results


@pytest.mark.parametrize("first", ["accelerate", "shard"])
@pytest.mark.parametrize("name", ["dit_block", "pixart", "sd35", "flux"])
def test_sharded_blocks_compute_the_same(name, first, one_rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    built = build(name)
    plain, sharded = built.module.float(), copy.deepcopy(built.module).float()
    expected = backward(plain, floats(built))
    if first == "accelerate":
        accelerate(sharded)
    for part in reversed(
        list(sharded.modules())
    ):  # units as small as they may be: projections, feed-forwards
        if type(part).__name__ in ("FeedForward", "Attention", "FluxAttention", "GELU"):
            fully_shard(part)
    fully_shard(sharded)
    if first == "shard":
        accelerate(sharded)
    found = backward(sharded, floats(built))
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert isinstance(mine, DTensor)
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, **bounds(plain))


def bounds(module):
    """Of gradients, some of which are zero but for rounding: a part of the greatest one."""
    greatest = max(float(parameter.grad.abs().max()) for parameter in module.parameters())
    return {"rtol": 1e-3, "atol": 1e-6 * greatest}


@pytest.mark.parametrize("training", [False, True])
def test_a_dit_in_an_arena_embeds_all_blocks_at_once(training):
    built = build("dit")
    module = built.module.float().train(training)
    other = copy.deepcopy(module)
    torch.manual_seed(3)
    expected = backward(other, floats(built))
    ArenaAdamW(module.parameters(), lr=1e-3)
    accelerate(module)
    norms = [block.norm1 for block in module.transformer_blocks]
    assert _is_one_batch(norms, built.inputs["hidden_states"].float())
    torch.manual_seed(3)
    torch.testing.assert_close(backward(module, floats(built)), expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **bounds(other))


@pytest.mark.parametrize("change", ["separate", "lora", "hook", "dtype"])
def test_embedders_that_are_no_batch_are_left_to_their_blocks(change):
    built = build("dit")
    module = built.module.float()
    if change == "lora":
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["norm1.linear"]), module)
        module.requires_grad_(True)  # so that the arena spaces the layers below LoRA's evenly too
    if change != "separate":
        ArenaAdamW(module.parameters(), lr=1e-3)
    norms = [block.norm1 for block in module.transformer_blocks]
    if change == "hook":
        norms[1].emb.register_forward_hook(lambda *args: None)
    x = built.inputs["hidden_states"].float()
    assert not _is_one_batch(norms, x.bfloat16() if change == "dtype" else x)
