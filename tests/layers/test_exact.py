"""Accelerated layers compute what torch's compute, as well as torch, and keep only their inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from unet_models import LAYERS, MODELS, build, call_unet, gradients

from fastdistill.layers import accelerate

NAMES = [*LAYERS, *MODELS]


def errors(found, exact):
    """Relative error of every tensor, in the norm over its elements.

    Left out are gradients that are zero: a bias of keys adds the same to all logits of a row.
    """
    return {
        name: float((found[name].double() - truth).norm() / truth.norm())
        for name, truth in exact.items()
        if truth.norm() > 1e-10
    }


def together(found, exact):
    """Relative error of all gradients as one vector, and that of the output."""
    names = [name for name in exact if name != "output"]
    one, other = (torch.cat([v[n].double().flatten() for n in names]) for v in (found, exact))
    whole = {"output": exact["output"], "gradients": other}
    return errors({"output": found["output"], "gradients": one}, whole)


def assert_as_exact(mine, torchs):
    """Errors are at most twice torch's."""
    assert mine.keys() == torchs.keys()
    worse = {key: (mine[key], torchs[key]) for key in mine if mine[key] > 2 * torchs[key] + 1e-7}
    assert not worse


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_as_exact_as_torchs(name, dtype):
    """Each of a block's; in bfloat16 a whole model's roundings are one draw, judged together."""
    module, inputs, call = build(name)
    judge = together if name in MODELS and dtype == torch.bfloat16 else errors
    exact = gradients(module, inputs, call, torch.float64)
    torchs = judge(gradients(module, inputs, call, dtype), exact)
    assert accelerate(module).replaced
    assert_as_exact(judge(gradients(module, inputs, call, dtype), exact), torchs)


@pytest.mark.parametrize("name", NAMES)
def test_in_float64_they_are_equal_to_rounding(name):
    module, inputs, call = build(name)
    exact = gradients(module, inputs, call, torch.float64)
    accelerate(module)
    assert max(errors(gradients(module, inputs, call, torch.float64), exact).values()) < 1e-12


@pytest.mark.parametrize("name", ["sdxl", "pixels"])
def test_channels_last_models_stay_channels_last(name):
    module, inputs, call = build(name)
    exact = gradients(module, inputs, call, torch.float64)
    accelerate(module)
    last = {key: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v
            for key, v in inputs.items()}  # fmt: skip
    options = {"memory_format": torch.channels_last}
    found = gradients(module, last, call, torch.float64, **options)
    assert max(errors(found, exact).values()) < 1e-12
    seen = []
    block = next(m for m in module.modules() if type(m).__name__ == "ResnetBlock2D")
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    call(module.to(**options), last)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", list(MODELS))
def test_undone_models_are_what_they_were(name):
    module, inputs, call = build(name)
    before = gradients(module, inputs, call, torch.float32)
    parts = [(type(part), sorted(vars(part))) for part in module.modules()]
    keys, parameters = list(module.state_dict()), list(module.parameters())
    accelerated = accelerate(module)
    assert list(module.state_dict()) == keys
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert [(type(part), sorted(vars(part))) for part in module.modules()] != parts
    accelerated.undo()
    assert [(type(part), sorted(vars(part))) for part in module.modules()] == parts
    after = gradients(module, inputs, call, torch.float32)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_what_each_patch_replaces_in_an_sdxl():
    module, _, _ = build("sdxl")
    assert accelerate(copy.deepcopy(module)).replaced == {
        "residual_block": 8,
        "spatial_input": 4,
        "output_norm": 1,
        "gated_feed_forward": 8,
        "transformer_block": 8,
        "attention_priority": 16,
    }
    assert accelerate(module, only=["spatial_input"]).replaced == {"spatial_input": 4}


def test_divisions_by_one_are_dropped_and_others_are_not():
    def divisions(name):
        module, inputs, call = build(name)
        accelerate(module)
        with torch.profiler.profile() as profile:
            call(module, inputs)
        return sum(row.count for row in profile.key_averages() if row.key == "aten::div")

    assert [divisions(name) for name in ("block", "residual", "attention_image")] == [0, 0, 0]
    assert divisions("residual_scaled") == 1


def test_a_norm_with_a_hook_is_left_to_run_it():
    module, inputs, call = build("residual")
    seen = []
    module.norm2.register_forward_hook(lambda *args: seen.append(1))
    assert accelerate(module).replaced == {}
    call(module, inputs)
    assert seen == [1]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("residual", "norm2"),
        ("block", "norm3"),
        ("block", "ff.net.0"),
        ("block", "attn1"),
        ("attention_image", "group_norm"),
        ("transformer_linear", "norm"),
    ],
)
def test_hooks_of_a_later_day_run_too(name, part):
    module, inputs, call = build(name)
    accelerate(module)
    before, seen = call(module, inputs), []
    module.get_submodule(part).register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(call(module, inputs), before)
    assert seen == [1]


@pytest.mark.parametrize("name", ["sdxl", "pixels"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    module, inputs, call = build(name)
    accelerate(module)
    plain = gradients(module, inputs, call, torch.float32)
    module.enable_gradient_checkpointing()
    module.train()
    again = gradients(module, inputs, call, torch.float32)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value)


@pytest.mark.parametrize("name", ["residual", "residual_scale_shift", "block", "attention_image"])
def test_layers_compile_as_one_graph(name):
    module, inputs, call = build(name)
    accelerate(module)
    eager = gradients(module, inputs, call, torch.float32)
    torch._dynamo.reset()

    def compiled(module, inputs):
        return torch.compile(module, fullgraph=True, backend="aot_eager")(**inputs)

    found = gradients(module, inputs, compiled, torch.float32)
    assert found.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("name", ["sdxl", "pixels"])
def test_autocast_gives_torchs_dtypes_and_errors(name):
    module, inputs, call = build(name)
    exact = gradients(module, inputs, call, torch.float64)

    def autocast(module, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return call(module, inputs)

    torchs = gradients(module, inputs, autocast, torch.float32)
    accelerate(module)
    mine = gradients(module, inputs, autocast, torch.float32)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in torchs.items()}
    assert_as_exact(together(mine, exact), together(torchs, exact))


def test_dropout_and_lora_run_as_they_always_do():
    peft = pytest.importorskip("peft")
    module, inputs, _ = build("sdxl")
    targets = ["to_q", "to_v", "net.2", "conv1"]
    module.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    exact = gradients(module, inputs, call_unet, torch.float64)
    accelerate(module)
    assert max(errors(gradients(module, inputs, call_unet, torch.float64), exact).values()) < 1e-12
    module, inputs, call = build("block")
    accelerate(module)
    module.ff.net[1].p = 0.5
    torch.manual_seed(0)
    first = call(module, inputs)
    assert call(module, inputs).ne(first).any()
    assert isinstance(module.ff.net[1], nn.Dropout)
