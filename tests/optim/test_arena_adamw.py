"""`ArenaAdamW` against torch's AdamW and explicit loops: bits, states, counters, refusals.

torch's fused AdamW on a CPU computes what its vectors leave over at a tensor's end in another order
of operations, so "bitwise" is of shapes without a rest; with one, and for torch's foreach AdamW,
an update from the same state is within an ulp of the numbers that are added.
"""

from __future__ import annotations

import copy
import gc
import platform
from collections.abc import Callable

import pytest
import torch
from synchronisation import no_synchronisation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.ops import _backend
from fastdistill.optim import Arena, ArenaAdamW

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
VECTOR = 16  # the widest that torch has in float32
LOW = {"stochastic_rounding": True, "moments": "8bit", "seed": 3}

needs_extension = pytest.mark.skipif(
    _backend.extension_path() is None, reason="the C++ extension is not built"
)
as_torch_fuses = pytest.mark.skipif(
    platform.machine() != "x86_64" or _backend.extension_path() is None,
    reason="torch fuses otherwise elsewhere, and the reference has its own order",
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(*, rest: bool = True, dtype: torch.dtype = F32) -> list[nn.Parameter]:
    """Channels-last convolutions, nothing, and with a rest to torch's vectors odd shapes."""
    shapes = [(32,), (16, 8), (0, 4), (7, 16)] + [(5,), (13, 3), (), (1001,)] * rest
    values = [random(*shape, seed=len(shape)) for shape in shapes]
    values += [random(8, 4, 3, 3).to(memory_format=torch.channels_last), torch.zeros(48)]
    return [nn.Parameter(value.to(dtype)) for value in values]


def groups(values: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": values[::3], "lr": 1e-2, "weight_decay": 0.1},
        {"params": values[1::3], "lr": 3e-3, "weight_decay": 0.0},
        {"params": values[2::3], "weight_decay": 0.5},
    ]


def set_gradients(values: list[nn.Parameter], seed: int, factor: float = 1.0) -> None:
    """Equal ones for equal parameters, assigned by hand as a loop of its own may do."""
    for place, value in enumerate(values):
        drawn = torch.empty_like(value, dtype=F32).copy_(
            random(*value.shape, seed=99 * seed + place)
        )
        value.grad = (factor * drawn).to(value.grad_dtype)


def owned(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [value for group in optimizer.param_groups for value in group["params"]]


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value.detach() for value in owned(optimizer)]


def update(optimizer: torch.optim.Optimizer, seed: int, factor: float = 1.0) -> None:
    set_gradients(owned(optimizer), seed, factor)
    optimizer.step()


def assert_same(mine: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    for ours, other in zip(weights(mine), weights(theirs), strict=True):
        assert torch.equal(ours, other)
        assert ours.stride() == other.stride()


@as_torch_fuses
def test_twenty_updates_in_groups_are_those_of_fused_adamw_bit_by_bit():
    options = {"lr": 2e-2, "betas": (0.8, 0.95), "eps": 1e-6}
    mine = ArenaAdamW(groups(parameters(rest=False)), **options)
    theirs = torch.optim.AdamW(groups(parameters(rest=False)), fused=True, **options)
    for seed in range(20):
        update(mine, seed), update(theirs, seed)
    assert_same(mine, theirs)
    ours, others = (optimizer.state_dict()["state"] for optimizer in (mine, theirs))
    for number, other in others.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ours[number][key], other[key])


def ulps_apart(mine: Tensor, theirs: Tensor, before: Tensor, lr: float) -> float:
    """Largest difference in ulps of the numbers that an update adds."""
    scale = torch.maximum(theirs.abs(), before.abs()).clamp(min=lr)
    ulp = scale.log2().floor().exp2() * torch.finfo(scale.dtype).eps
    return ((mine - theirs).abs() / ulp).max().item() if mine.numel() else 0.0


@pytest.mark.parametrize("form", ["fused", "foreach"])
def test_odd_shapes_and_foreach_are_within_an_ulp_an_update(form):
    mine = ArenaAdamW(groups(parameters()), lr=2e-2)
    for seed in range(20):
        theirs = torch.optim.AdamW(groups(parameters()), lr=2e-2, **{form: True})
        for own, other in zip(weights(mine), weights(theirs), strict=True):
            other.copy_(own)
        if seed:
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
        before = copy.deepcopy(weights(theirs))
        for group in theirs.param_groups:
            group |= {"fused": form == "fused", "foreach": form == "foreach"}
        update(mine, seed), update(theirs, seed)
        for own, other, old in zip(weights(mine), weights(theirs), before, strict=True):
            assert ulps_apart(own, other, old, 2e-2) <= 1
            whole = own.numel() // VECTOR * VECTOR
            if form == "fused" and platform.machine() == "x86_64":
                own, other = (value.as_strided((whole,), (1,)) for value in (own, other))
                assert torch.equal(own, other) or _backend.extension_path() is None


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_clip_grad_norm_to_rounding(max_norm):
    """Norms are summed in other orders: 2e-6 relative after ten updates, as of one factor."""
    mine = ArenaAdamW(groups(parameters()), lr=2e-2, max_norm=max_norm)
    theirs = torch.optim.AdamW(groups(parameters()), lr=2e-2, fused=True)
    for seed in range(10):
        set_gradients(owned(theirs), seed)
        norm = nn.utils.clip_grad_norm_(owned(theirs), max_norm)
        theirs.step()
        update(mine, seed)
        torch.testing.assert_close(mine.grad_norm, norm, rtol=1e-6, atol=0)
    for own, other in zip(weights(mine), weights(theirs), strict=True):
        torch.testing.assert_close(own, other, rtol=2e-6, atol=2e-7)


def test_a_tied_weight_is_updated_once():
    def tied() -> nn.Sequential:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        network[2].weight = network[0].weight
        return network

    networks = [tied(), tied()]
    mine = ArenaAdamW(networks[0].parameters(), 1e-2)
    theirs = torch.optim.AdamW(networks[1].parameters(), 1e-2, fused=True)
    for seed in range(5):
        for network, optimizer in zip(networks, (mine, theirs), strict=True):
            optimizer.zero_grad()
            network(random(4, 16, seed=seed)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(weights(mine), weights(theirs), rtol=1e-6, atol=1e-7)
    assert networks[0][2].weight is networks[0][0].weight


def test_float64_networks_compute_in_float64():
    mine = ArenaAdamW(groups(parameters(dtype=F64)), lr=2e-2, max_norm=1.0, ema_decays=[0.9])
    theirs = torch.optim.AdamW(groups(parameters(dtype=F64)), lr=2e-2)
    assert {value.dtype for value in mine.arena.ranges.values()} == {F64}
    for seed in range(10):
        set_gradients(owned(theirs), seed)
        nn.utils.clip_grad_norm_(owned(theirs), 1.0)
        theirs.step()
        update(mine, seed)
    for own, other in zip(weights(mine), weights(theirs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-13, atol=1e-14)


def mixed() -> list[nn.Parameter]:
    return parameters(rest=False)[:4] + parameters(rest=False, dtype=BF16)[4:]


@as_torch_fuses
@pytest.mark.parametrize("low", [BF16, F16, "mixed"])
def test_low_precision_networks_are_an_explicit_loop_over_masters(low):
    """Gradients are widened to float32, torch updates float32 masters, weights are their cast."""

    def make() -> list[nn.Parameter]:
        return mixed() if low == "mixed" else parameters(rest=False, dtype=low)

    network = make()
    masters = [nn.Parameter(value.detach().float()) for value in network]
    mine = ArenaAdamW(groups(network), lr=2e-2)
    theirs = torch.optim.AdamW(groups(masters), lr=2e-2, fused=True)
    assert mine.arena.ranges["gradient"].dtype == (F32 if low == "mixed" else low)
    for seed in range(20):
        set_gradients(network, seed)
        for master, value in zip(masters, network, strict=True):
            master.grad = torch.empty_like(master).copy_(value.grad)
        mine.step(), theirs.step()
    for value, master in zip(network, masters, strict=True):
        assert torch.equal(value, master.to(value.dtype))
        assert torch.equal(mine.state[value]["master"], master)


def test_float32_gradients_of_a_bfloat16_network_accumulate_exactly():
    value = nn.Parameter(torch.zeros(1, dtype=BF16))
    ArenaAdamW([value], gradient_dtype=F32)
    for _ in range(300):  # bfloat16 stops to count at 256
        value.sum().backward()
    assert value.grad.dtype == F32
    assert value.grad == 300


# States.


OPTIONS = {
    "float32": (F32, {}),
    "averages": (F32, {"ema_decays": [0.9, 0.5], "ema_warmup": True}),
    "bfloat16": (BF16, {"ema_decays": [0.9]}),
    "stochastic": (BF16, {"stochastic_rounding": True, "seed": 3}),
    "8bit": (F32, {"moments": "8bit"}),
    "everything": (BF16, LOW | {"ema_decays": [0.9]}),
}


def made(options: str, seed: int = 0) -> ArenaAdamW:
    dtype, more = OPTIONS[options]
    values = parameters(dtype=dtype)
    for value in values:
        value.data += seed
    return ArenaAdamW(groups(values), lr=2e-2, **more)


def assert_bitwise(mine: ArenaAdamW, theirs: ArenaAdamW) -> None:
    for role, flat in mine.arena.ranges.items():
        if role != "gradient":
            assert torch.equal(flat, theirs.arena.ranges[role]), role
    assert_same(mine, theirs)


@pytest.mark.parametrize("network_first", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_saved_run_continues_bitwise(options, network_first):
    whole = made(options)
    for seed in range(3):
        update(whole, seed)
    state, values = copy.deepcopy(whole.state_dict()), copy.deepcopy(weights(whole))
    again = made(options, seed=1)
    update(again, 17)
    for load_network in (network_first, not network_first):
        if load_network:
            for own, saved in zip(weights(again), values, strict=True):
                own.copy_(saved)  # as load_state_dict does; detach shares the count of writes
        else:
            again.load_state_dict(state)
    for seed in range(3, 6):
        update(whole, seed), update(again, seed)
    assert_bitwise(again, whole)


@pytest.mark.parametrize("options", OPTIONS)
def test_an_optimizer_can_be_given_its_own_state(options):
    mine, theirs = made(options), made(options)
    for seed in range(3):
        update(mine, seed), update(theirs, seed)
    mine.load_state_dict(mine.state_dict())
    assert_bitwise(mine, theirs)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_loaded_state_is_shown_and_saved_as_it_was(options):
    """Masters bring their low-precision weights along; float32 weights are the network's own."""
    whole, again = made(options), made(options, seed=1)
    update(whole, 0)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    if OPTIONS[options][0] == BF16:
        for mine, theirs in zip(owned(again), owned(whole), strict=True):
            assert torch.equal(mine, again.state[mine]["master"].bfloat16())
            assert torch.equal(again.state[mine]["master"], whole.state[theirs]["master"])
    expected = whole.state_dict()["state"]
    for number, state in again.state_dict()["state"].items():
        assert state.keys() == expected[number].keys()
        assert all(torch.equal(value, expected[number][key]) for key, value in state.items())


def test_the_state_has_weights_that_were_just_loaded_into_the_network():
    mine = made("bfloat16")
    update(mine, 0)
    for value in weights(mine):
        value.fill_(5.0)
    assert all(state["master"].eq(5).all() for state in mine.state_dict()["state"].values())
    for value in weights(mine):
        value.fill_(6.0)
    masterless = torch.optim.AdamW(groups(parameters())).state_dict()
    mine.load_state_dict(masterless)
    assert all(value.eq(6).all() for value in weights(mine))


def test_each_parameter_has_a_step_of_its_own_in_the_state():
    """torch's optimizers count each up by itself, in place."""
    mine = made("float32")
    update(mine, 0)
    steps = [state["step"] for state in mine.state_dict()["state"].values()]
    assert len({step.data_ptr() for step in steps}) == len(steps) == len(weights(mine))
    assert all(step == 1 for step in steps)


def test_8bit_moments_are_decoded_in_the_state():
    mine, exact = made("8bit"), made("float32")
    update(mine, 0), update(exact, 0)
    states = mine.state_dict()["state"]
    for number, wanted in exact.state_dict()["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            found = states[number][key]
            assert found.dtype == F32
            peak = wanted[key].abs().max().item() if found.numel() else 0.0
            torch.testing.assert_close(found, wanted[key], rtol=0.1, atol=0.01 * peak)


def test_a_state_without_averages_restarts_them_at_the_weights():
    mine, plain = made("averages"), made("float32")
    update(mine, 0), update(plain, 1)
    mine.load_state_dict(plain.state_dict())
    for role in mine.arena.averages:
        assert torch.equal(mine.arena.ranges[role], mine.arena.ranges["parameter"])


def test_weights_written_between_updates_are_not_undone():
    for options in ("float32", "bfloat16", "stochastic", "everything"):
        mine = made(options)
        update(mine, 0)
        for value in weights(mine):
            value.fill_(5.0)
        for group in mine.param_groups:
            group["lr"] = 0.0
        update(mine, 1)
        assert all(value.eq(5).all() for value in weights(mine)), options


def test_showing_an_average_leaves_the_trajectory_alone():
    for options in ("averages", "everything"):
        mine, theirs = made(options), made(options)
        for seed in range(4):
            update(mine, seed), update(theirs, seed)
            with mine.averaged():
                shown = weights(mine)[0].clone()
                place = weights(mine)[0].data_ptr() - mine.arena.ranges["ema_0"].data_ptr()
                assert options != "averages" or 0 <= place < mine.arena.ranges["ema_0"].nbytes
            average = mine.state[owned(mine)[0]]["ema_0"]
            assert torch.equal(shown, average.to(shown.dtype))
        assert_bitwise(mine, theirs)


# Counters.


class Ops(TorchDispatchMode):
    """Names of the ops, and the bytes that each reads and writes by its schema."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "profiler":
            return function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        moved = 0
        for argument, value in zip(function._schema.arguments, args, strict=False):
            tensors = value if isinstance(value, list) else [value]
            held = sum(v.nbytes for v in tensors if isinstance(v, Tensor) and v.numel() > 3)
            moved += held * (argument.name != "copy") + held * argument.is_write
        self.bytes.append(moved)
        return function(*args, **(kwargs or {}))


def many(number: int, size: int = 256, dtype: torch.dtype = F32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size, dtype=dtype)) for _ in range(number)]


def ops_of(optimizer: ArenaAdamW) -> Ops:
    for value in weights(optimizer):
        value.fill_(1.0)
    optimizer.arena.ranges["gradient"].fill_(0.1)
    optimizer.step()
    with Ops() as seen:
        optimizer.step()
    return seen


@needs_extension
@pytest.mark.parametrize(
    ("gradient_dtype", "moments", "expected"),
    [(F32, "float32", 38), (BF16, "float32", 36), (F32, "8bit", 26), (BF16, "8bit", 24)],
)
def test_an_update_is_two_ops_that_move_the_planned_bytes(gradient_dtype, moments, expected):
    """8-bit moments have scales besides: 2 of 4 bytes for 256 parameters, read and written."""
    size = 10 * 256
    optimizer = ArenaAdamW(
        many(10, dtype=BF16),
        ema_decays=[0.9],
        max_norm=1.0,
        gradient_dtype=gradient_dtype,
        moments=moments,
    )
    seen = ops_of(optimizer)
    scales = 16 / 256 if moments == "8bit" else 0
    noise = ["select", "copy_"] if moments == "8bit" else []
    assert seen.names == ["sum_of_squares", *noise, "adamw_ema_"]
    found = [moved / size for moved in seen.bytes]
    assert (found[0], found[-1]) == (gradient_dtype.itemsize, expected + scales)


def test_the_update_does_not_read_the_copy():
    mine, theirs = made("bfloat16"), made("bfloat16")
    mine.arena.ranges["copy"].fill_(float("nan"))
    update(mine, 0), update(theirs, 0)
    assert_same(mine, theirs)


@needs_extension
def test_work_on_the_host_does_not_grow_with_the_number_of_parameters():
    counts = []
    for number in (10, 1000):
        optimizer = ArenaAdamW(many(number, 2), ema_decays=[0.9])
        with Ops() as seen:
            for _ in range(3):
                optimizer.arena.ranges["gradient"].fill_(0.1)
                optimizer.step(), optimizer.zero_grad()
        counts.append(len(seen.names))
        before = tensors_alive()
        optimizer.step(), optimizer.zero_grad()
        assert tensors_alive() == before
    assert counts == [3 * 4, 3 * 4]  # one fill, two of step, one of zero_grad


def tensors_alive() -> int:
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("options", OPTIONS)
def test_an_update_does_not_synchronise(options):
    if _backend.extension_path() is None and "8bit" in str(OPTIONS[options]):
        pytest.skip("the reference of 8-bit moments reads values")
    optimizer = made(options)
    update(optimizer, 0)
    optimizer.max_norm = 1.0
    with no_synchronisation():
        for _ in range(3):
            optimizer.step(), optimizer.zero_grad()
            assert optimizer.grad_norm.shape == optimizer.skipped.shape == ()


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    mine = made("everything")
    update(mine, 0)
    before = {role: flat.clone() for role, flat in mine.arena.ranges.items()}
    update(mine, 1, float("inf"))
    after = mine.arena.ranges
    assert all(torch.equal(after[role], before[role]) for role in before if role != "gradient")
    assert (int(mine.counts["step"]), int(mine.skipped)) == (1, 1)


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, "amsgrad is True; ArenaAdamW supports only False"),
        ({"maximize": True}, "maximize is True"),
        ({"differentiable": True}, "differentiable is True"),
        ({"lr": -1.0}, "lr is -1.0; expected 0 or more"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (1.0, 0.9)}, r"betas are \(1.0, 0.9\); expected numbers from 0 and below 1"),
        ({"stochastic_rounding": True}, "the network computes in torch.float32"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ArenaAdamW(many(2), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decays": [0.9]}, "there are 1 ema_decays, but the arena has 0 averages"),
        ({"moments": "8bit"}, "gradient_dtype and moments are the arena's"),
        ({"gradient_dtype": BF16}, "gradient_dtype and moments are the arena's"),
    ],
)
def test_options_that_contradict_the_arena_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ArenaAdamW(Arena(nn.Linear(2, 2)), **options)


def test_groups_that_are_refused():
    first, second = many(2)
    with pytest.raises(ValueError, match="empty parameter list"):
        ArenaAdamW([])
    with pytest.raises(ValueError, match="no trainable parameter"):
        ArenaAdamW([first.detach()])
    for name, value in (("betas", (0.5, 0.9)), ("eps", 1e-3)):
        with pytest.raises(ValueError, match=f"groups differ in {name}"):
            ArenaAdamW([{"params": [first]}, {"params": [second], name: value}])
    with pytest.raises(ValueError, match="there are 65 parameter groups; expected at most 64"):
        ArenaAdamW([{"params": [value]} for value in many(65)])
    gap = Arena([("a", first), ("b", second)], group=lambda name, _: 2 * (name == "b"))
    with pytest.raises(ValueError, match=r"arena has groups \[0, 2\]; expected 0, 1, 2"):
        ArenaAdamW(gap)
    optimizer = ArenaAdamW([first])
    with pytest.raises(ValueError, match="make a new ArenaAdamW with all parameter groups"):
        optimizer.add_param_group({"params": [second]})
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad is True"):
        optimizer.step()


def test_a_parameter_that_was_frozen_is_refused_once_it_has_a_gradient():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3).requires_grad_(False))
    optimizer = ArenaAdamW(layers.parameters())
    layers(random(1, 2)).sum().backward()
    optimizer.step()
    layers.requires_grad_(True)
    layers(random(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(3, 2\) has a gradient, but was frozen"):
        optimizer.step()


def edited(edit: Callable[[dict], object]) -> dict:
    optimizer = torch.optim.AdamW(many(2), lr=0.5)
    update(optimizer, 0)
    state = optimizer.state_dict()
    edit(state)
    return state


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda state: state["state"][1].update(exp_avg=torch.zeros(3)),
            r"exp_avg of 0.1 has shape \(3,\); expected \(256,\)",
        ),
        (lambda state: state["state"][1]["step"].fill_(7), r"have done \[1.0, 7.0\] updates"),
        (lambda state: state["param_groups"][0].update(amsgrad=True), "amsgrad is True"),
        (
            lambda state: state["param_groups"][0].update(params=[0]),
            r"the state's groups have \[1\] parameters; expected \[2\]",
        ),
    ],
)
def test_states_that_are_refused_change_nothing(edit, message):
    mine, theirs = ArenaAdamW(many(2)), ArenaAdamW(many(2))
    update(mine, 1), update(theirs, 1)
    with pytest.raises(ValueError, match=message):
        mine.load_state_dict(edited(edit))
    update(mine, 2), update(theirs, 2)
    assert_bitwise(mine, theirs)


def test_an_optimizer_cannot_be_copied():
    with pytest.raises(ValueError, match="load its state_dict into one"):
        copy.deepcopy(ArenaAdamW(many(1)))


def test_the_norm_of_no_update_is_not_known():
    with pytest.raises(ValueError, match="no update was done yet"):
        _ = ArenaAdamW(many(1)).grad_norm


def test_dropped_gradients_are_none_and_taken_in_by_the_update():
    ends = []
    for drops in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        optimizer = ArenaAdamW(network.parameters(), lr=1e-2)
        for _ in range(3):
            network(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=drops)
            assert all((value.grad is None) == drops for value in network.parameters())
        ends.append(optimizer.arena.ranges["parameter"])
    assert torch.equal(*ends)
