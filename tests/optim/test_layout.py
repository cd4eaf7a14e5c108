"""The arena's layout: where parameters lie, what a rank owns, and that C++ and Python agree."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    _chunk_with_empty,
    _get_dim0_padded_size,
)

from fastdistill.optim import layout as module
from fastdistill.optim.layout import Entry, Layout, Shard, _plan_reference

quick = settings(max_examples=200, deadline=None)

shapes = st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple)


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[Entry], dict]:
    """Entries and the arguments of a layout."""
    drawn = draw(
        st.lists(st.tuples(shapes, st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12)
    )
    entries = [
        Entry((f"p{index}",), shape, unit, group)
        for index, (shape, unit, group) in enumerate(drawn)
    ]
    arguments = {
        "shards": draw(st.integers(1, 9)),
        "alignment": draw(st.sampled_from((1, 2, 16, 256))),
        "packed": draw(st.booleans()),
    }
    return entries, arguments


def placed(layout: Layout) -> list[Entry]:
    """The entries that take space, in the order of their offsets."""
    filled = [entry for entry in layout.entries if layout.padded(entry.names[0])]
    return sorted(filled, key=lambda entry: layout.offset(entry.names[0]))


def end(layout: Layout, entry: Entry) -> int:
    name = entry.names[0]
    return layout.offset(name) + layout.padded(name)


# What a layout looks like


def test_parameters_start_at_multiples_of_256_elements_in_the_order_of_the_forward_pass():
    layout = Layout([Entry(("weight",), (10, 30)), Entry(("bias",), (10,)), Entry(("gain",), ())])
    assert [layout.offset(name) for name in ("weight", "bias", "gain")] == [0, 512, 768]
    assert (layout.size, layout.parameters, layout.owned(0)) == (1024, 311, 311)


def test_packed_parameters_follow_each_other_and_only_units_are_aligned():
    entries = [Entry(("a",), (10, 30)), Entry(("b",), (10,)), Entry(("c",), (5,), unit=1)]
    layout = Layout(entries, packed=True)
    assert [layout.offset(name) for name in "abc"] == [0, 300, 512]
    assert layout.units == [(0, 310), (512, 517)]
    assert layout.size == 768


def test_units_ascend_and_the_groups_in_each_and_else_the_given_order_is_kept():
    entries = [
        Entry(("late",), (1,), unit=7),
        Entry(("plain",), (1,), unit=2, group=1),
        Entry(("decayed",), (1,), unit=2, group=0),
        Entry(("decayed too",), (1,), unit=2, group=0),
    ]
    layout = Layout(entries, alignment=1)
    names = [entry.names[0] for entry in placed(layout)]
    assert names == ["decayed", "decayed too", "plain", "late"]
    assert layout.units == [(0, 3), (3, 4)]
    assert [layout.unit_of(name) for name in names] == [0, 0, 0, 1]


def test_37_rows_on_two_ranks_are_19_and_18():
    layout = Layout([Entry(("first",), (3,)), Entry(("weight",), (37, 4))], shards=2)
    assert layout.shard("weight", 0) == Shard(first_row=0, rows=19, offset=256, numel=76)
    assert layout.shard("weight", 1) == Shard(first_row=19, rows=18, offset=256, numel=72)
    assert layout.padded("weight") == 76
    assert [layout.owned(rank) for rank in (0, 1)] == [2 + 76, 1 + 72]


def test_ranks_beyond_the_rows_own_nothing():
    layout = Layout([Entry(("weight",), (5, 4))], shards=4)
    assert [layout.shard("weight", rank)[:2] for rank in range(4)] == [
        (0, 2),
        (2, 2),
        (4, 1),
        (5, 0),
    ]


def test_a_tied_parameter_has_one_place_and_all_its_names():
    layout = Layout([Entry(("embed.weight", "head.weight"), (8, 4)), Entry(("bias",), (8,))])
    assert layout.offset("head.weight") == layout.offset("embed.weight") == 0
    assert layout.shard("head.weight", 0) == layout.shard("embed.weight", 0)
    assert layout.parameters == 40


def test_runs_of_one_group_go_on_through_padding_and_units():
    groups = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 0)]
    entries = [Entry((f"p{i}",), (3,), unit, group) for i, (unit, group) in enumerate(groups)]
    assert Layout(entries).ranges() == ([0, 256, 768, 1024], [0, 1, 2, 0])


def test_runs_of_groups_that_take_no_space_are_left_out():
    empty = Entry(("empty",), (0, 4), group=0)
    assert Layout([empty, Entry(("full",), (3,), group=1)]).ranges() == ([0], [1])
    assert Layout([empty]).ranges() == ([0], [0])
    assert Layout([empty]).size == 0


def test_bytes_of_each_role_count_padding():
    layout = Layout([Entry(("weight",), (10, 30))], shards=4)
    assert layout.size == 256
    roles = {"parameter": torch.float32, "copy": torch.bfloat16, "exp_avg_sq": torch.uint8}
    assert layout.bytes_per_rank(roles) == {"parameter": 1024, "copy": 512, "exp_avg_sq": 256}


def test_an_order_of_dims_is_kept_and_changes_no_place():
    weight = Entry(("weight",), (8, 4, 3, 3), order=(0, 2, 3, 1))
    layout = Layout([weight, Entry(("bias",), (8,))], shards=2)
    assert layout.entries[0].order == (0, 2, 3, 1)
    assert layout.padded("weight") == 4 * 36
    assert Layout([Entry(("weight",), (8, 4), order=(1, 0))]).size == 256


# What holds of every layout


@quick
@given(networks())
def test_cpp_plans_what_the_reference_plans(network):
    arena = pytest.importorskip("fastdistill._arena")
    entries, arguments = network
    parameters = [(*module._matrix(entry), entry.unit, entry.group) for entry in entries]
    assert arena.plan(parameters, **arguments) == _plan_reference(parameters, **arguments)


@quick
@given(networks())
def test_parameters_are_aligned_apart_and_inside_the_range(network):
    entries, arguments = network
    layout = Layout(entries, **arguments)
    order = placed(layout)
    assert layout.size % layout.alignment == 0
    assert all(end(layout, entry) <= layout.size for entry in order)
    for before, after in itertools.pairwise(order):
        assert end(layout, before) <= layout.offset(after.names[0])
    aligned = [start for start, _ in layout.units]
    if not layout.packed:
        aligned += [layout.offset(entry.names[0]) for entry in entries]
    assert all(offset % layout.alignment == 0 for offset in aligned)


@quick
@given(networks())
def test_no_space_is_lost_but_to_alignment(network):
    entries, arguments = network
    layout = Layout(entries, **arguments)
    ends = [0]
    for entry in placed(layout):
        gap = layout.offset(entry.names[0]) - ends[-1]
        same_unit = layout.packed and any(start < ends[-1] < stop for start, stop in layout.units)
        assert 0 <= gap < layout.alignment
        assert gap == 0 or not same_unit
        ends.append(end(layout, entry))
    assert layout.size - ends[-1] < layout.alignment


@quick
@given(networks())
def test_placement_follows_units_then_groups_then_the_given_order(network):
    entries, arguments = network
    order = placed(Layout(entries, **arguments))
    wanted = sorted(order, key=lambda entry: (entry.unit, entry.group, entries.index(entry)))
    assert order == wanted


@quick
@given(networks())
def test_every_element_belongs_to_exactly_one_rank(network):
    entries, arguments = network
    layout = Layout(entries, **arguments)
    for entry in entries:
        name, numel = entry.names[0], math.prod(entry.shape)
        elements = torch.arange(numel).view(entry.shape)
        shards = [layout.shard(name, rank) for rank in range(layout.shards)]
        parts = [elements[s.first_row : s.first_row + s.rows].flatten() for s in shards]
        assert torch.equal(torch.cat(parts), elements.flatten())
        assert [part.numel() for part in parts] == [shard.numel for shard in shards]
        assert all(shard.numel <= layout.padded(name) for shard in shards)
        assert {shard.offset for shard in shards} == {layout.offset(name)}
    assert sum(layout.owned(rank) for rank in range(layout.shards)) == layout.parameters


@quick
@given(networks())
def test_shards_and_padding_are_those_of_fsdp2(network):
    entries, arguments = network
    layout = Layout(entries, **arguments)
    for entry in entries:
        name, shape = entry.names[0], torch.Size(entry.shape)
        padded = _get_dim0_padded_size(shape, layout.shards)
        assert layout.padded(name) * layout.shards == padded.numel()
        chunks = _chunk_with_empty(torch.empty(shape, device="meta"), layout.shards, dim=0)
        assert layout.padded(name) == chunks[0].numel()
        owned = [layout.shard(name, rank) for rank in range(layout.shards)]
        assert [shard.numel for shard in owned] == [chunk.numel() for chunk in chunks]


@quick
@given(networks())
def test_a_packed_unit_is_as_large_as_what_fsdp2_reduce_scatters(network):
    entries, arguments = network
    layout = Layout(entries, **arguments | {"packed": True})
    for place, (start, stop) in enumerate(layout.units):
        unit = [entry for entry in entries if layout.unit_of(entry.names[0]) == place]
        padded = [_get_dim0_padded_size(torch.Size(e.shape), layout.shards) for e in unit]
        assert stop - start == sum(size.numel() for size in padded) // layout.shards


@quick
@given(networks())
def test_runs_ascend_from_0_and_give_every_element_its_group(network):
    entries, arguments = network
    layout = Layout(entries, **arguments)
    starts, groups = layout.ranges()
    assert starts[0] == 0
    assert all(a < b for a, b in itertools.pairwise((*starts, max(layout.size, 1))))
    assert all(a != b for a, b in itertools.pairwise(groups))
    stops = [*starts[1:], layout.size]
    for entry in placed(layout):
        first, last = layout.offset(entry.names[0]), end(layout, entry)
        inside = [
            group
            for start, stop, group in zip(starts, stops, groups, strict=True)
            if start < last and first < stop
        ]
        assert inside == [entry.group]


def test_without_the_extension_layouts_are_the_same(monkeypatch):
    entries = [Entry((f"p{i}",), (i % 7, i % 5), i // 10, i % 3) for i in range(60)]
    here = Layout(entries, shards=3)
    monkeypatch.setattr(module, "_plan", _plan_reference)
    there = Layout(entries, shards=3)
    assert (here.size, here.units, here.ranges()) == (there.size, there.units, there.ranges())
    assert all(here.offset(e.names[0]) == there.offset(e.names[0]) for e in entries)


def test_offsets_go_beyond_32_bits():
    layout = Layout([Entry((name,), (2**20, 2**20)) for name in "ab"], shards=64)
    assert (layout.offset("b"), layout.size) == (2**34, 2**35)


# What is refused

WEIGHT = Entry(("weight",), (4, 3))


@pytest.mark.parametrize(
    ("entries", "arguments", "message"),
    [
        ([], {}, "entries is empty; expected a network's parameters"),
        ([WEIGHT], {"shards": 0}, "shards is 0; expected the number of ranks"),
        ([WEIGHT], {"alignment": 0}, "alignment is 0 elements; expected a power of two"),
        ([WEIGHT], {"alignment": 96}, "alignment is 96 elements; expected a power of two"),
        ([WEIGHT, WEIGHT], {}, "'weight' names two parameters; a tied parameter is one entry"),
        ([Entry(("a", "a"), (4,))], {}, "'a' names two parameters"),
        ([Entry((), (4,))], {}, r"shape \(4,\) has no name"),
        ([Entry(("a",), (4, -1))], {}, r"'a' has shape \(4, -1\); expected no negative sizes"),
        ([Entry(("a",), ())], {"shards": 2}, r"no dim 0 to shard; reshape the parameter to \(1,\)"),
        ([Entry(("a",), (4, 3), order=(0, 0))], {}, r"order \(0, 0\); expected each dim once"),
        ([Entry(("a",), (4, 3), order=(0,))], {}, r"order \(0,\); expected each dim once"),
        ([Entry(("a",), (4, 3), order=(1, 0))], {"shards": 2}, "an order that starts with 0"),
        ([Entry(("a",), (2**40, 2**40))], {}, "expected below 2\\^63"),
    ],
)
def test_what_no_range_can_hold_is_refused(entries, arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout(entries, **arguments)


def test_names_and_ranks_that_there_are_not_are_refused():
    layout = Layout([WEIGHT], shards=2)
    with pytest.raises(ValueError, match="there is no parameter 'bias' among the 1 here"):
        layout.offset("bias")
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank is {rank}; expected one of the 2 from 0"):
            layout.shard("weight", rank)
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            layout.owned(rank)
