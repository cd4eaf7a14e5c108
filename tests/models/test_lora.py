"""LoRA: only its weights are trained, and one set of base weights serves teacher and critic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import condition_of, tiny_adapter, tiny_denoiser
from torch import Tensor

from fastdistill.models.lora import add_lora, lora_weights, merge_lora, shared_lora_critic
from fastdistill.optim import Arena, ArenaAdamW

FAMILIES = ["sdxl", "unet", "dit", "pixart", "sd3", "flux"]
CONVOLUTIONS = ["to_q", "conv1", "downsamplers.0.conv"]


def arguments_of(adapter: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, *adapter.sample_shape, generator=generator).to(dtype)
    return x, torch.tensor([0.3, 0.9]), condition_of(adapter)


def shake(module: torch.nn.Module) -> None:
    """Give the trainable weights other values."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_begins_as_the_base_and_alone_is_trained(family):
    adapter = tiny_adapter(family)
    arguments = arguments_of(adapter)
    before, base = adapter(*arguments), copy.deepcopy(adapter.state_dict())
    add_lora(adapter, rank=2, alpha=4)
    torch.testing.assert_close(adapter(*arguments), before, rtol=0, atol=0)
    trained = [name for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = ArenaAdamW(Arena(adapter), lr=1e-2)
    for _ in range(2):  # A moves only once B has
        adapter(*arguments).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (adapter(*arguments) - before).abs().max() > 1e-4
    after = adapter.state_dict()
    for name, value in base.items():
        module, _, leaf = name.rpartition(".")
        kept = after.get(name, after.get(f"{module}.base_layer.{leaf}"))
        assert torch.equal(kept, value)


def test_lora_weights_are_float32_masters_over_a_bfloat16_base():
    adapter = tiny_adapter("sdxl").to(torch.bfloat16)
    arguments = arguments_of(adapter, torch.bfloat16)
    before = adapter(*arguments)
    add_lora(adapter, rank=2)
    dtypes = {p.requires_grad: p.dtype for p in adapter.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    arena = Arena(adapter, compute_dtype=torch.bfloat16)
    assert arena.ranges["parameter"].dtype == torch.float32
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    optimizer = ArenaAdamW(arena, lr=1e-2)
    for _ in range(3):
        adapter(*arguments).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (adapter(*arguments) - before).abs().max() > 1e-3


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone():
    one, two = tiny_adapter("dit"), tiny_adapter("dit")
    state = torch.get_rng_state()
    add_lora(one, rank=2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    add_lora(two, rank=2, seed=3)
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_merged_weights_compute_the_same_under_the_diffusers_names():
    adapter = tiny_adapter("pixart")
    names, arguments = list(adapter.state_dict()), arguments_of(adapter)
    add_lora(adapter, rank=3, target_modules=["to_q", "to_out.0", "ff.net.0.proj"])
    shake(adapter)
    expected = adapter(*arguments)
    assert all("lora_A" in name or "lora_B" in name for name in lora_weights(adapter))
    merge_lora(adapter)
    assert list(adapter.state_dict()) == names
    torch.testing.assert_close(adapter(*arguments), expected, rtol=1e-4, atol=1e-5)
    add_lora(adapter, rank=2)  # and may get new ones


def test_wrong_uses_are_refused():
    adapter = tiny_adapter("dit")
    with pytest.raises(ValueError, match="rank is 0; expected at least 1"):
        add_lora(adapter, rank=0)
    with pytest.raises(ValueError, match="no layer whose name ends in query; choose others"):
        add_lora(adapter, rank=1, target_modules=["query"])
    with pytest.raises(ValueError, match="no LoRA weights; add_lora adds them"):
        lora_weights(adapter)
    add_lora(adapter, rank=1)
    with pytest.raises(ValueError, match="LoRA weights already"):
        add_lora(adapter, rank=1)
    with pytest.raises(ValueError, match="a target is GroupNorm"):
        shared_lora_critic(tiny_denoiser("sdxl"), 1, target_modules=["norm1"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_critic_begins_as_the_teacher_and_leaves_it_alone(family):
    teacher = tiny_denoiser(family).requires_grad_(False)
    expected = {name: value.clone() for name, value in teacher.state_dict().items()}
    critic = shared_lora_critic(teacher, rank=2)
    arguments = arguments_of(teacher.network)
    before = teacher(*arguments)
    torch.testing.assert_close(critic(*arguments), before, rtol=0, atol=0)
    teacher.requires_grad_(False)  # as the objective does
    optimizer = ArenaAdamW(Arena(critic), lr=1e-2)
    for _ in range(2):
        critic(*arguments).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (critic(*arguments) - before).abs().max() > 1e-4
    torch.testing.assert_close(teacher(*arguments), before, rtol=0, atol=0)
    assert teacher.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in teacher.state_dict().items())


def test_a_shared_critic_holds_no_weight_of_the_base():
    teacher = tiny_denoiser("sdxl")
    critic = shared_lora_critic(teacher, rank=2)
    base = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not base & {parameter.data_ptr() for parameter in critic.parameters()}
    assert all(name.startswith("network.updates.") for name in critic.state_dict())
    size = sum(value.numel() for value in critic.state_dict().values())
    assert size < sum(value.numel() for value in teacher.state_dict().values()) / 10


def test_a_shared_critic_computes_what_a_critic_of_its_own_would():
    """The same updates, in one network by hooks and in the other by peft."""
    for targets in (None, CONVOLUTIONS):
        teacher, own = tiny_denoiser("sdxl"), tiny_adapter("sdxl")
        critic = shared_lora_critic(teacher, rank=2, alpha=6, target_modules=targets)
        add_lora(own, rank=2, alpha=6, target_modules=targets)
        shake(critic)
        ours = dict(critic.network.named_parameters())
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                if "lora_" in name:
                    place, _, which = name.removeprefix("model.").partition(".lora_")
                    part = "down" if which.startswith("A") else "up"
                    key = f"updates.{place.replace('.', '/')}.{part}.weight"
                    parameter.copy_(ours.pop(key))
        assert not ours
        arguments = arguments_of(own)
        torch.testing.assert_close(
            critic.network(*arguments), own(*arguments), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("family", ["sdxl", "pixart"])
def test_recomputed_activations_see_the_updates_that_the_forward_saw(family):
    gradients = []
    for recompute in (False, True):
        teacher = tiny_denoiser(family).requires_grad_(False)
        critic = shared_lora_critic(teacher, rank=2)
        shake(critic)
        if recompute:
            critic.network.enable_gradient_checkpointing()
        x, t, condition = arguments_of(teacher.network)
        x.requires_grad_()
        teachers = teacher.network(x, t, condition).square().sum()
        critic.network(x, t, condition).square().sum().backward()  # its blocks: switched on
        with critic.network._switch.set(True):
            teachers.backward()  # the teacher's: off, whatever the switch says meanwhile
        gradients.append([x.grad, *(parameter.grad for parameter in critic.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5 * plain.abs().max())


def test_a_shared_critic_in_bfloat16_has_float32_masters():
    teacher = tiny_denoiser("sdxl").requires_grad_(False)
    teacher.network.to(torch.bfloat16)
    teacher.input_dtype = torch.bfloat16
    critic = shared_lora_critic(teacher, rank=2)
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.float32}
    arguments = arguments_of(teacher.network)
    optimizer = ArenaAdamW(Arena(critic, compute_dtype=torch.bfloat16), lr=1e-2)
    critic(*arguments).square().mean().backward()
    optimizer.step()
    assert (critic(*arguments) - teacher(*arguments)).abs().max() > 1e-3
