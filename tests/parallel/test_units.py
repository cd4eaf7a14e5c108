"""Gathering units: bounded, whole, and of modules whose forward is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdistill.parallel import gathering_units
from fastdistill.parallel.units import unit_of_parameters


def linear(parameters: int) -> nn.Linear:
    return nn.Linear(parameters, 1, bias=False, device="meta")


class Parent(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self) -> None: ...


def sizes(module: nn.Module, largest: int) -> list[int]:
    """Parameters of each unit, the root's first."""
    units = gathering_units(module, largest)
    owners = unit_of_parameters(module, units)
    found = [0] * (len(units) + 1)
    for name, parameter in module.named_parameters():
        found[owners[name]] += parameter.numel()
    return found


def test_the_first_modules_within_the_bound_are_units():
    net = Parent(
        small=linear(5), block=Parent(inner=linear(60), outer=linear(40)), large=linear(300)
    )
    assert gathering_units(net, 100) == ["block", "large"]
    assert sizes(net, 100) == [5, 100, 300]
    assert gathering_units(net, 99) == ["block.inner", "block.outer", "large"]


def test_containers_are_passed_through_since_their_entries_may_be_called_alone():
    net = Parent(blocks=nn.ModuleList([linear(50), linear(60)]), tail=nn.Sequential(linear(70)))
    assert gathering_units(net, 2000) == []  # none is a sixteenth of the bound: all the root's
    assert gathering_units(net, 800) == ["blocks.0", "blocks.1", "tail.0"]


def test_weights_that_units_share_are_the_roots():
    net = Parent(a=linear(50), b=linear(50), c=linear(50))
    net.b.weight = net.a.weight
    assert gathering_units(net, 100) == ["c"]


def test_a_bound_below_one_is_refused():
    with pytest.raises(ValueError, match="largest is 0"):
        gathering_units(linear(3), 0)


def test_sdxls_units_are_bounded_though_one_of_its_blocks_has_1_2_billion_parameters(sdxl):
    assert max(sum(p.numel() for p in block.parameters()) for block in sdxl.up_blocks) > 1.2e9
    found = sizes(sdxl, 400_000_000)
    assert sum(found) == sum(p.numel() for p in sdxl.parameters()) > 2.5e9
    assert len(found) < 20
    assert max(found) <= 400_000_000


@pytest.fixture(scope="module")
def sdxl():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            attention_head_dim=[5, 10, 20],
            block_out_channels=[320, 640, 1280],
            cross_attention_dim=2048,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            layers_per_block=2,
            projection_class_embeddings_input_dim=2816,
            sample_size=128,
            transformer_layers_per_block=[1, 2, 10],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            use_linear_projection=True,
        )
