"""`ArenaAdamW` in other people's loops: what they do with torch's AdamW gives the same weights.

Each loop runs twice, on a diffusers UNet whose parameters leave no rest to torch's vectors (see
test_adamw.py), once with ``torch.optim.AdamW(fused=True)``: the weights agree bit by bit.
"""

from __future__ import annotations

import copy
import io
import platform
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from fastdistill.ops import _backend
from fastdistill.optim import ArenaAdamW

LR = 1e-2
BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or _backend.extension_path() is None,
    reason="torch fuses otherwise elsewhere, and the reference has its own order",
)


@pytest.fixture(scope="module")
def prototype() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=16,
        out_channels=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )


@pytest.fixture
def unet(prototype) -> UNet2DConditionModel:
    return copy.deepcopy(prototype)


def loss_of(unet: nn.Module, update: int) -> Tensor:
    generator = torch.Generator().manual_seed(update)
    dtype = next(unet.parameters()).dtype
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 16, 4, 4), (2, 3, 16)))
    return (unet(x.to(dtype), 7 * update, text.to(dtype)).sample.float() - x).square().mean()


def torch_adamw(parameters, lr: float = LR, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr, fused=True, **options)


def trained(prototype: nn.Module, loop: Callable, optimizer: Callable) -> dict[str, Tensor]:
    unet = copy.deepcopy(prototype)
    loop(unet, optimizer(unet.parameters(), LR))
    return unet.state_dict()


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]


def plain(unet: nn.Module, optimizer: torch.optim.Optimizer, updates: Iterable[int]) -> None:
    for update in updates:
        optimizer.zero_grad()
        loss_of(unet, update).backward()
        optimizer.step()


# Loops: each takes a network and an optimizer, and trains.


def clear_in_place(unet, optimizer):
    for update in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(unet, update).backward()
        optimizer.step()


def clear_by_the_model(unet, optimizer):
    for update in range(3):
        unet.zero_grad()
        loss_of(unet, update).backward()
        optimizer.step()


def accumulate(unet, optimizer):
    for update in range(6):
        (loss_of(unet, update) / 2).backward()
        if update % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def closures(unet, optimizer):
    for update in range(3):

        def closure(update=update):
            optimizer.zero_grad()
            loss = loss_of(unet, update)
            loss.backward()
            return loss

        expected = loss_of(copy.deepcopy(unet), update)
        assert optimizer.step(closure) == expected


def hooks(unet, optimizer):
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    plain(unet, optimizer, range(2))
    assert seen == ["pre", "post"] * 2


def edited_groups(unet, optimizer):
    for update in range(4):
        for group in optimizer.param_groups:
            group |= {"lr": LR / (1 + update), "weight_decay": 0.1 * update}
        plain(unet, optimizer, [update])


def assigned_gradients(unet, optimizer):
    for update in range(3):
        gradients = torch.autograd.grad(loss_of(unet, update), list(unet.parameters()))
        for value, gradient in zip(unet.parameters(), gradients, strict=True):
            value.grad = gradient
        optimizer.step()


def second_derivatives(unet, optimizer):
    for update in range(2):
        optimizer.zero_grad()
        loss_of(unet, update).backward(create_graph=True)
        optimizer.step()


def one_cycle(unet, optimizer):
    schedule(unet, optimizer, lr_scheduler.OneCycleLR(optimizer, 2 * LR, total_steps=6))


def cosine(unet, optimizer):
    schedule(unet, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=1e-4))


def warm_up(unet, optimizer):
    schedule(unet, optimizer, lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 3)))


def schedule(unet, optimizer, scheduler):
    for update in range(5):
        plain(unet, optimizer, [update])
        scheduler.step()


def replaced_weights(unet, optimizer):
    """Memory that the arena does not know, as vector_to_parameters and memory formats give."""
    plain(unet, optimizer, [0])
    vector = nn.utils.parameters_to_vector(unet.parameters()).detach()
    nn.utils.vector_to_parameters(0.9 * vector, unet.parameters())
    plain(unet, optimizer, [1])


def two_optimizers(unet, optimizer):
    """Which take turns with the same parameters."""
    other = type(optimizer)(list(unet.parameters())[::2], lr=LR / 2, fused=True)
    for update in range(4):
        plain(unet, [optimizer, other][update % 2], [update])
        unet.zero_grad()


def loaded_weights(unet, optimizer):
    start = copy.deepcopy(unet.state_dict())
    plain(unet, optimizer, [0, 1])
    unet.load_state_dict(start)
    plain(unet, optimizer, [2])


def kept_running(unet, optimizer):
    scale(unet, optimizer, unscale=False)


def clipped_by_the_user(unet, optimizer):
    scale(unet, optimizer, unscale=True)


def scale(unet, optimizer, unscale):
    """Grows beyond float32 after three updates, skips, and goes on."""
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**40, growth_factor=2.0**86, backoff_factor=2.0**-86, growth_interval=3
    )
    scales = []
    for update in range(6):
        optimizer.zero_grad()
        scaler.scale(100 * loss_of(unet, update)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(unet.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [2.0**40, 2.0**40, 2.0**126, 2.0**40, 2.0**40, 2.0**40]


def clamped_overflow(unet, optimizer):
    """Clipping by value makes an overflow finite; the scaler has seen it nevertheless."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-86)
    for update in range(2):
        optimizer.zero_grad()
        scaler.scale(100 * loss_of(unet, update)).backward()
        scaler.unscale_(optimizer)
        for value in unet.parameters():
            value.grad.nan_to_num_(0.0, 0.1, -0.1)
        scaler.step(optimizer)
        scaler.update()


LOOPS = [
    *(clear_in_place, clear_by_the_model, accumulate, closures, hooks, edited_groups),
    *(assigned_gradients, second_derivatives, one_cycle, cosine, warm_up, replaced_weights),
    *(two_optimizers, loaded_weights, kept_running, clipped_by_the_user, clamped_overflow),
]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_gives_the_weights_of_fused_adamw_bit_by_bit(prototype, loop):
    theirs = trained(prototype, loop, torch_adamw)
    assert_equal(trained(prototype, loop, ArenaAdamW), theirs)
    assert not torch.equal(theirs["conv_in.weight"], prototype.conv_in.weight)


def test_named_parameters_name_the_arenas(unet):
    named = dict(unet.named_parameters())
    decayed = {name: value for name, value in named.items() if value.ndim > 1}
    rest = {name: value for name, value in named.items() if value.ndim < 2}
    optimizer = ArenaAdamW(
        [{"params": decayed.items()}, {"params": rest.items(), "weight_decay": 0.0}]
    )
    assert sorted(optimizer.arena.names) == sorted(named)
    assert optimizer.param_groups[1]["param_names"] == list(rest)
    plain(unet, optimizer, range(2))


def test_a_parameter_without_gradient_counts_as_one_of_zero(prototype):
    """As with ``set_to_none=False``: it decays, and moves by its momentum."""
    results = []
    for make in (ArenaAdamW, torch_adamw):
        unet = copy.deepcopy(prototype)
        optimizer = make(unet.parameters(), LR)
        plain(unet, optimizer, [0])
        optimizer.zero_grad(set_to_none=False)
        loss_of(unet, 1).backward()
        unet.conv_in.weight.grad = None if make is ArenaAdamW else torch.zeros(16, 16, 3, 3)
        optimizer.step()
        results.append(unet.state_dict())
    assert_equal(*results)


def test_a_graph_from_before_an_update_is_refused(unet):
    """As torch's own optimizers make it: its gradient would mix old activations and new weights."""
    optimizer = ArenaAdamW(unet.parameters())
    loss = loss_of(unet, 0)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_norm_is_that_of_unscaled_gradients(unet):
    optimizer = ArenaAdamW(unet.parameters(), max_norm=1.0)
    loss_of(unet, 0).backward()
    norm = nn.utils.get_total_norm([value.grad for value in unet.parameters()])
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(unet, 0)).backward()
    scaler.step(optimizer), scaler.update()
    torch.testing.assert_close(optimizer.grad_norm, norm)


# States that wander.


def through_an_archive(state: dict) -> dict:
    archive = io.BytesIO()
    torch.save(state, archive)
    archive.seek(0)
    return torch.load(archive, weights_only=True)


def through_torch_distributed(unet: nn.Module, source, target) -> None:
    """By names, as torch.distributed.checkpoint stores it."""
    state = get_optimizer_state_dict(unet, source)
    set_optimizer_state_dict(unet, target, copy.deepcopy(state))


@pytest.mark.parametrize("carry", [copy.deepcopy, through_an_archive, None])
@pytest.mark.parametrize("route", ["torch to arena", "arena to torch", "arena to arena"])
def test_a_state_continues_the_trajectory_bit_by_bit(prototype, route, carry):
    makers = {"torch": torch_adamw, "arena": partial(ArenaAdamW, fused=True)}
    first, second = (makers[name] for name in route.split(" to "))
    unet, whole = copy.deepcopy(prototype), copy.deepcopy(prototype)
    optimizer = first(unet.parameters(), LR, betas=(0.8, 0.9))
    plain(unet, optimizer, range(3))
    continued = second(unet.parameters(), 1.0)
    if carry is None:
        through_torch_distributed(unet, optimizer, continued)
    else:
        continued.load_state_dict(carry(optimizer.state_dict()))
    unet.zero_grad()
    plain(unet, continued, range(3, 5))
    plain(whole, torch_adamw(whole.parameters(), betas=(0.8, 0.9)), range(5))
    assert_equal(unet.state_dict(), whole.state_dict())
    assert continued.param_groups[0]["lr"] == LR


def test_a_saved_bfloat16_run_continues_bit_by_bit_from_files(prototype, tmp_path):
    """The masters are in the optimizer's state; the pipeline has the network."""
    options = {"lr": LR, "ema_decays": [0.5], "stochastic_rounding": True}
    whole = copy.deepcopy(prototype).to(BF16)
    optimizer = ArenaAdamW(whole.parameters(), **options)
    plain(whole, optimizer, range(2))
    whole.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=BF16)
    continued = ArenaAdamW(again.parameters(), **options)
    continued.load_state_dict(through_an_archive(optimizer.state_dict()))
    again.train()
    for unet, own in ((whole, optimizer), (again, continued)):
        plain(unet, own, range(2, 4))
    assert_equal(again.state_dict(), whole.state_dict())
    with optimizer.averaged(), continued.averaged():
        assert_equal(again.state_dict(), whole.state_dict())


def test_a_bfloat16_network_follows_weights_that_are_loaded_later(prototype):
    unet, other = (copy.deepcopy(prototype).to(BF16) for _ in range(2))
    optimizer = ArenaAdamW(unet.parameters(), LR)
    plain(unet, optimizer, range(2))
    unet.load_state_dict(other.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    plain(unet, optimizer, [2])
    assert_equal(unet.state_dict(), other.state_dict())


@pytest.mark.parametrize("safe", [True, False])
def test_a_pipeline_saves_and_loads_the_network(unet, tmp_path, safe):
    """Weights share memory in the arena; safetensors and pickles have each of them, once."""
    optimizer = ArenaAdamW(unet.parameters(), LR, ema_decays=[0.9])
    plain(unet, optimizer, range(2))
    unet.save_pretrained(tmp_path, safe_serialization=safe)
    (archive,) = tmp_path.glob("diffusion_pytorch_model.*")
    assert archive.stat().st_size < 1.6 * 4 * unet.num_parameters()
    again = UNet2DConditionModel.from_pretrained(tmp_path, use_safetensors=safe)
    assert_equal(again.state_dict(), unet.state_dict())
    with optimizer.averaged():
        unet.save_pretrained(tmp_path / "ema")
        shown = copy.deepcopy(unet.state_dict())
    averaged = UNet2DConditionModel.from_pretrained(tmp_path / "ema")
    assert_equal(averaged.state_dict(), shown)


def test_a_copied_network_trains_apart(unet):
    optimizer = ArenaAdamW(unet.parameters(), LR)
    plain(unet, optimizer, [0])
    twin = copy.deepcopy(unet)
    before = copy.deepcopy(unet.state_dict())
    plain(twin, ArenaAdamW(twin.parameters(), LR), range(2))
    assert_equal(unet.state_dict(), before)


def test_a_compiled_network_sees_updates_and_averages():
    """In the same graph, which is compiled once."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv2d(16, 16, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 16))
    network = copy.deepcopy(eager)
    mine = ArenaAdamW(network.parameters(), LR, ema_decays=[0.5])
    theirs = torch_adamw(eager.parameters())
    run = torch.compile(network, backend=backend)
    x = torch.randn(2, 16, 4, 4)
    for forward, optimizer in ((run, mine), (eager, theirs)):
        for _ in range(3):
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            optimizer.step()
    assert_equal(network.state_dict(), eager.state_dict())
    with mine.averaged(), torch.no_grad():
        assert torch.equal(run(x), network(x))
        assert not torch.equal(run(x), eager(x))
