"""`Arena`: where weights and gradients lie, and how those from elsewhere are brought in."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from fastdistill.ops import MOMENT_BLOCK
from fastdistill.optim import Arena, arena_roles, plan_arena

BF16 = torch.bfloat16


class Network(nn.Module):
    """Odd shapes, a channels-last convolution, a scalar, nothing, a tie and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.leave = nn.Linear(5, 7)
        self.again = nn.Linear(5, 7)
        self.again.weight = self.leave.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.enter(x).mean((2, 3)) * self.scale)
        return self.leave(x) + self.again(x) + self.nothing.sum()


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def holds(flat: Tensor, value: Tensor) -> bool:
    """Whether a tensor is part of a range."""
    first = flat.data_ptr()
    return first <= value.data_ptr() and value.data_ptr() + value.nbytes <= first + flat.nbytes


def test_the_parameters_become_views_and_nothing_else_changes():
    network, twin = Network(), Network()
    before, forms = dict(network.named_parameters()), [p.stride() for p in network.parameters()]
    arena = Arena(network)
    assert all(before[name] is value for name, value in network.named_parameters())
    assert [value.stride() for value in network.parameters()] == forms
    assert network.enter.weight.is_contiguous(memory_format=torch.channels_last)
    for mine, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        if mine.requires_grad and mine.numel():
            assert holds(arena.ranges["parameter"], mine)
            assert mine.data_ptr() % 256 == arena.ranges["parameter"].data_ptr() % 256
    assert not holds(arena.ranges["parameter"], network.frozen.weight)
    assert torch.equal(network(images()), twin(images()))


def test_a_tied_weight_has_one_place_under_both_names():
    network = Network()
    arena = Arena(network)
    assert arena.names.count("leave.weight") == 1
    assert arena.layout.offset("leave.weight") == arena.layout.offset("again.weight")
    assert network.again.weight is network.leave.weight


def test_autograd_accumulates_into_the_arena():
    network, twin = Network(), Network()
    arena = Arena(network)
    for seed in (1, 2):
        network(images(seed)).square().sum().backward()
        twin(images(seed)).square().sum().backward()
    arena.collect_gradients()
    for mine, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            assert torch.equal(mine.grad, theirs.grad)
            assert not mine.numel() or holds(arena.ranges["gradient"], mine.grad)
    arena.zero_gradients()
    assert not arena.ranges["gradient"].any()


def test_gradients_from_elsewhere_are_collected():
    network = Network()
    arena = Arena(network)
    arena.ranges["gradient"].fill_(7)
    network.zero_grad()
    network.leave.weight.grad = torch.ones(7, 5)
    arena.collect_gradients()
    total = arena.ranges["gradient"].sum() - 7 * (arena.layout.size - arena.layout.parameters)
    assert total == 35
    assert holds(arena.ranges["gradient"], network.leave.weight.grad)


def test_a_dense_weight_and_its_place_may_have_other_strides():
    """Neither a row-major gradient of a channels-last weight nor an expanded weight is misread."""
    network = Network()
    arena = Arena(network)
    gradient = torch.randn(5, 3, 3, 3)
    network.enter.weight.grad = gradient.clone()
    arena.collect_gradients()
    assert torch.equal(network.enter.weight.grad, gradient)
    expanded = nn.Parameter(torch.ones(3, 1).expand(3, 4))
    assert torch.equal(Arena([("a", expanded)]).parameters[0], torch.ones(3, 4))


def test_float32_weights_that_moved_are_brought_back():
    network = Network()
    arena = Arena(network)
    wanted = torch.randn_like(network.leave.weight)
    network.leave.weight.data = wanted.clone()
    network.to(memory_format=torch.contiguous_format)
    nn.utils.vector_to_parameters(torch.arange(7.0), [network.leave.bias])
    arena.collect_weights()
    assert torch.equal(network.leave.weight, wanted)
    assert torch.equal(network.leave.bias, torch.arange(7.0))
    for value in (network.leave.weight, network.leave.bias, network.enter.weight):
        assert holds(arena.ranges["parameter"], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda network: network.to(BF16), "scale became torch.bfloat16"),
        (
            lambda network: setattr(network.leave.bias, "data", torch.zeros(9)),
            r"leave.bias became torch.float32 of shape \(9,\).* shape \(7,\)",
        ),
    ],
)
def test_a_network_that_became_another_is_refused(change, message):
    network = Network()
    arena = Arena(network)
    change(network)
    with pytest.raises(ValueError, match=message):
        arena.collect_weights()


@pytest.mark.parametrize("stochastic", [False, True])
def test_low_precision_weights_that_were_written_become_the_masters(stochastic):
    network = Network().to(BF16)
    arena = Arena(network)
    arena.stochastic_rounding = stochastic
    master = arena.view("leave.bias", arena.ranges["parameter"])
    master.copy_(torch.tensor([1.003, 1.003, 1.003, -1.003, 0.0, -3.0, 5.0]))
    arena.recast()
    kept = master.clone()
    ulp = 2.0**-7
    with torch.no_grad():  # as it was, up, down, away from zero, to a neighbour of 0, far, NaN
        network.leave.bias.copy_(
            torch.tensor([1.0, 1 + ulp, 1 - ulp / 2, -1 - ulp, 1e-40, 4.0, float("nan")])
        )
    wanted = network.leave.bias.float()
    arena.collect_weights()
    neighbour = torch.tensor([True, stochastic, False, stochastic, stochastic, False, False])
    torch.testing.assert_close(master, torch.where(neighbour, kept, wanted), equal_nan=True)
    assert torch.equal(network.leave.bias.float().nan_to_num(), wanted.nan_to_num())


def test_low_precision_weights_that_moved_are_brought_back_too():
    network = Network().to(BF16)
    arena = Arena(network)
    network.leave.bias.data = torch.ones(7, dtype=BF16)
    arena.collect_weights()
    assert holds(arena.ranges["copy"], network.leave.bias)
    assert torch.equal(arena.view("leave.bias", arena.ranges["parameter"]), torch.ones(7))


def test_a_mixed_network_computes_in_masters_and_copies():
    network = Network()
    network.leave.to(BF16)
    arena = Arena(network)
    assert arena.ranges["gradient"].dtype == torch.float32
    assert holds(arena.ranges["parameter"], network.enter.weight)
    assert holds(arena.ranges["copy"], network.leave.weight)
    with torch.no_grad():
        network.enter.weight.fill_(1.001), network.leave.weight.fill_(1.0)
    arena.collect_weights()
    assert network.enter.weight.eq(1.001).all()
    assert arena.view("leave.weight", arena.ranges["parameter"]).eq(1).all()


def test_compute_dtype_makes_a_low_precision_network_with_exact_masters():
    network, twin = Network(), Network()
    arena = Arena(network, compute_dtype=BF16)
    assert network.leave.weight.dtype == network.leave.weight.grad.dtype == BF16
    assert torch.equal(arena.view("leave.weight", arena.ranges["parameter"]), twin.leave.weight)


def test_averages_are_shown_in_place_in_float32():
    network = Network()
    arena = Arena(network, averages=2)
    arena.ranges["ema_1"].fill_(2)
    own = network.leave.weight.clone()
    with arena.showing("ema_1"):
        assert holds(arena.ranges["ema_1"], network.leave.weight)
        assert network.leave.weight.eq(2).all()
    assert torch.equal(network.leave.weight, own)
    arena.restart_averages()
    assert torch.equal(arena.view("leave.weight", arena.ranges["ema_1"]), own)


@pytest.mark.parametrize("moved", [False, True])
def test_what_was_written_before_averages_were_shown_is_not_lost(moved):
    network = Network().to(BF16)
    arena = Arena(network, averages=1)
    if moved:
        network.leave.bias.data = torch.ones(7, dtype=BF16)
    else:
        nn.init.ones_(network.leave.bias)
    with arena.showing("ema_0"):
        assert not network.leave.bias.eq(1).any()
    arena.collect_weights()
    assert network.leave.bias.eq(1).all()
    assert arena.view("leave.bias", arena.ranges["parameter"]).eq(1).all()


def test_frozen_parameters_leave_the_graph():
    network = Network()
    arena = Arena(network)
    with arena.frozen():
        assert not network(images()).requires_grad
    assert network.leave.weight.requires_grad
    assert not network.frozen.weight.requires_grad


def test_bytes_are_those_of_the_plan():
    network = Network().to(BF16)
    arena = Arena(network, averages=1, moments="8bit")
    held, roles = arena.bytes(), arena_roles([BF16], averages=1, moments="8bit")
    with torch.device("meta"):
        plan = plan_arena(Network()).bytes_per_rank(roles)
    scales = arena.layout.size // MOMENT_BLOCK * 4
    assert held == {role: size + scales * role.startswith("exp_avg") for role, size in plan.items()}
    each = [held[role] / arena.layout.size for role in arena.ranges]
    assert each == [4, 2, 1 + 4 / 256, 1 + 4 / 256, 4, 2]


def test_an_archive_holds_the_weights_once():
    network = Network()
    arena = Arena(network)
    archive = io.BytesIO()
    torch.save(network.state_dict(), archive)
    assert len(archive.getvalue()) < arena.ranges["parameter"].nbytes + 8000
    archive.seek(0)
    for name, value in torch.load(archive, weights_only=True).items():
        assert torch.equal(value, network.state_dict()[name])


def test_a_copied_network_is_apart():
    network = Network()
    arena = Arena(network)
    twin = copy.deepcopy(network)
    twin(images()).sum().backward()
    for value in twin.parameters():
        assert not value.numel() or not holds(arena.ranges["parameter"], value)
        assert value.untyped_storage().nbytes() == value.nbytes
    assert not arena.ranges["gradient"].any()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("a", nn.Parameter(torch.zeros(2), requires_grad=False))], "no trainable parameter"),
        ([("a", nn.Parameter(torch.zeros(2, device="meta")))], "a is on meta"),
        (
            [("a", nn.Parameter(torch.zeros(2))), ("b", nn.Parameter(torch.ones(2).to("meta")))],
            "b is on meta and a on cpu; expected all parameters on one real device",
        ),
        ([("a", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))], "are torch.complex64"),
        (
            [
                ("a", nn.Parameter(torch.ones(2).half())),
                ("b", nn.Parameter(torch.ones(2).to(BF16))),
            ],
            "are torch.bfloat16, torch.float16; expected",
        ),
        (
            [("a", nn.Parameter(torch.ones(2).double())), ("b", nn.Parameter(torch.ones(2)))],
            "float64 alone",
        ),
    ],
)
def test_what_has_no_place_is_refused(named, message):
    with pytest.raises(ValueError, match=message):
        Arena(named)


def test_load_refuses_another_shape():
    arena = Arena([("a", nn.Parameter(torch.zeros(2)))])
    with pytest.raises(ValueError, match=r"exp_avg of a has shape \(3,\); expected \(2,\)"):
        arena.load("exp_avg", [torch.zeros(3)])
