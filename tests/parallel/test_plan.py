"""Plans on the meta device: closed forms at SDXL's size, and what real arenas and FSDP2 take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from processes import run_ranks
from test_sharded import network
from torch import nn
from torch.distributed.fsdp import FSDPModule

from bench.networks import sdxl_unet
from fastdistill.optim import Arena
from fastdistill.parallel import Mode, Parallel, Ranks, plan_network, plan_table
from fastdistill.parallel._fsdp2 import _groups
from fastdistill.parallel.units import LARGEST_UNIT

SDXL = 2_567_463_684
LARGEST = 350_840_320
"""Parameters of SDXL's largest units."""
BF16 = torch.bfloat16
SMALL_UNIT = 130


def near(found: int, expected: float, slack: float = 1e-3) -> bool:
    """Padding only adds."""
    return expected <= found <= expected * (1 + slack)


@pytest.fixture(scope="module")
def sdxl() -> nn.Module:
    return sdxl_unet()


@pytest.fixture(scope="module")
def teacher(sdxl) -> nn.Module:
    return copy.deepcopy(sdxl).to(BF16).requires_grad_(False)


@pytest.mark.parametrize("averages", [0, 1])
def test_sdxl_alone_takes_4_bytes_a_state_and_2_a_weight_and_gradient(sdxl, averages):
    plan = plan_network(sdxl, name="student", mode="single", compute_dtype=BF16, averages=averages)
    assert plan.parameters == SDXL
    bytes_of = {"parameter": 4, "gradient": 2, "exp_avg": 4, "exp_avg_sq": 4}
    bytes_of |= {"ema_0": 4} if averages else {}
    bytes_of |= {"copy": 2}
    assert list(plan.bytes) == list(bytes_of)
    for role, size in bytes_of.items():
        assert near(plan.bytes[role], size * SDXL, slack=2e-4)
    assert plan.total == sum(plan.bytes.values())


@pytest.mark.parametrize("mode", ["resident", "fsdp"])
@pytest.mark.parametrize("shards", [8, 64])
def test_sdxl_sharded_takes_its_share_of_16_bytes(sdxl, mode, shards):
    plan = plan_network(sdxl, name="critic", mode=mode, shards=shards, compute_dtype=BF16)
    roles = ("parameter", "gradient", "exp_avg", "exp_avg_sq")
    assert near(sum(plan.bytes[role] for role in roles), 16 * SDXL / shards)
    assert list(plan.bytes) == [*roles, "gathered", "unreduced"]
    rest = plan.units[""]
    gathered = {"resident": SDXL + LARGEST, "fsdp": rest + 2 * LARGEST}[mode]
    assert near(plan.bytes["gathered"], 2 * gathered, slack=2e-3)
    assert near(plan.bytes["unreduced"], 6 * LARGEST)
    assert sum(plan.units.values()) == SDXL
    assert max(plan.units.values()) == LARGEST <= LARGEST_UNIT


def test_accumulation_keeps_all_gradients_in_float32(sdxl):
    options: dict[str, Any] = {"name": "x", "mode": "fsdp", "shards": 8, "compute_dtype": BF16}
    once = plan_network(sdxl, **options).bytes
    several = plan_network(sdxl, accumulates=True, **options).bytes
    assert several.pop("unreduced") - once.pop("unreduced") == 4 * SDXL
    assert several == once


def test_a_frozen_sdxl_has_weights_and_nothing_else(teacher):
    whole = plan_network(teacher, name="teacher", mode="single")
    assert whole.bytes == {"frozen": 2 * SDXL}
    sharded = plan_network(teacher, name="teacher", mode="fsdp", shards=8)
    assert list(sharded.bytes) == ["frozen", "gathered"]
    assert near(sharded.bytes["frozen"], 2 * SDXL / 8)
    assert near(sharded.bytes["gathered"], 2 * (sharded.units[""] + 2 * LARGEST), slack=2e-3)


def test_8_bit_moments_take_a_byte_and_a_scale(sdxl):
    plan = plan_network(sdxl, name="x", mode="resident", shards=8, moments="8bit")
    assert plan.bytes["exp_avg"] == plan.bytes["parameter"] / 4 * (1 + 4 / 256)


def test_a_table_has_a_line_a_network_and_their_sum(sdxl, teacher):
    student = plan_network(sdxl, name="student", mode="single", compute_dtype=BF16, averages=1)
    lines = plan_table([student, plan_network(teacher, name="teacher", mode="single")]).split("\n")
    assert lines[0].startswith("| network | parameters | mode | shards | parameter | gradient |")
    assert lines[2].startswith("| student | 2,567.5 M | single | 1 | 10.27 GB | 5.13 GB |")
    assert lines[3].endswith("| - | 5.13 GB | 5.13 GB |")
    assert lines[4].endswith("| 5.13 GB | **56.48 GB** |")


def test_a_mode_that_does_not_shard_has_no_shards(sdxl):
    with pytest.raises(ValueError, match="shards is 8; expected 1, or mode resident or fsdp"):
        plan_network(sdxl, name="x", mode="single", shards=8)


def on_meta() -> nn.Module:
    with torch.device("meta"):  # .to("meta") would untie weights
        return network()


def arena_part(plan) -> dict[str, int]:
    return {
        role: count
        for role, count in plan.bytes.items()
        if role not in ("frozen", "gathered", "unreduced")
    }


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("compute_dtype", [None, BF16])
def test_a_real_arena_takes_what_was_planned(compute_dtype, moments):
    options: dict[str, Any] = {"compute_dtype": compute_dtype, "averages": 2, "moments": moments}
    plan = plan_network(on_meta(), name="x", mode="single", **options)
    net = network()
    assert arena_part(plan) == Arena(net, **options).bytes()
    assert plan.bytes["frozen"] == sum(value.nbytes for value in net.frozen.parameters())


def taken(ranks: Ranks, mode: Mode, moments: Any) -> tuple[dict[str, int], list[int], int]:
    """Bytes of the arena, of each unit's gathered weights, and of gradients that FSDP2 keeps."""
    net = network()
    parallel = Parallel(ranks, mode, largest_unit=SMALL_UNIT)
    arena = parallel.arena(net, "student", compute_dtype=BF16, averages=1, moments=moments)
    arena.reduce_gradients(False)
    loss = net(torch.zeros(3, 5, dtype=BF16)).sum()
    modules = [part for part in net.modules() if isinstance(part, FSDPModule)]
    units = [group.fsdp_params for module in modules for group in _groups(module)]
    gathered = [sum(out.nbytes for one in unit for out in one.all_gather_outputs) for unit in units]
    loss.backward()
    kept = [one.unsharded_accumulated_grad for unit in units for one in unit]
    return arena.bytes(), gathered, sum(value.nbytes for value in kept if value is not None)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("mode", "moments"), [("resident", "float32"), ("fsdp", "8bit")])
def test_every_rank_takes_what_was_planned(size, mode, moments):
    options: dict[str, Any] = {"mode": mode, "shards": size, "compute_dtype": BF16}
    options |= {"averages": 1, "moments": moments, "largest_unit": SMALL_UNIT}
    plan = plan_network(on_meta(), name="x", **options)
    summed = plan_network(on_meta(), name="x", accumulates=True, **options)
    for arena, (root, *others), kept in run_ranks(size, taken, mode, moments):
        assert len(others) >= 3
        assert arena == arena_part(plan)
        assert kept == summed.bytes["unreduced"] - plan.bytes["unreduced"]
        everything = root + sum(others) + max(root, *others)
        expected = everything if mode == "resident" else root + sum(sorted(others)[-2:])
        assert plan.bytes["gathered"] == expected
