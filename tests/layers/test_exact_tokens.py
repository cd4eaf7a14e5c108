"""Accelerated transformers compute what diffusers' compute, as well as torch, and save less."""

from __future__ import annotations

import pytest
import torch
from token_models import BLOCKS, MODELS, build, gradients, outputs

from fastdistill.layers import accelerate

NAMES = [*BLOCKS, *MODELS]
PATCHES = {
    "dit": {"dit_block": 3, "dit_embedders": 1, "attention_priority": 3},
    "pixart": {"pixart_block": 2, "attention_priority": 4},
    "sd3": {"sd3_block": 3, "attention_priority": 3},
    "sd35": {"sd3_block": 3, "attention_priority": 4},
    "flux": {"flux_block": 2, "flux_single_block": 2, "attention_priority": 4},
}


def errors(found, exact):
    """Relative error of every tensor, in the norm over its elements.

    Left out are gradients that are zero: a bias of keys adds the same to all logits of a row.
    """
    return {
        name: float((found[name].double() - truth).norm() / truth.norm())
        for name, truth in exact.items()
        if truth.norm() > 1e-5 * max(value.norm() for value in exact.values())
    }


def whole(found, exact):
    """Relative error of all gradients as one vector, and of the outputs."""
    groups = {
        "outputs": [name for name in exact if name.startswith("output ")],
        "gradients": [name for name in exact if not name.startswith("output ")],
    }
    return {
        group: float(
            sum((found[n].double() - exact[n]).square().sum() for n in names).sqrt()
            / sum(exact[n].square().sum() for n in names).sqrt()
        )
        for group, names in groups.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_at_most_twice_torchs(name, dtype):
    """Of each tensor of a block; of a whole model's in bfloat16 all together, being one draw."""
    built = build(name)
    judge = whole if name in MODELS and dtype == torch.bfloat16 else errors
    exact = gradients(built, torch.float64)
    torchs = judge(gradients(built, dtype), exact)
    assert accelerate(built.module).replaced
    found = gradients(built, dtype)
    assert found.keys() == exact.keys()
    assert {value.dtype for value in found.values()} == {dtype}
    mine = judge(found, exact)
    floor = 4 * torch.finfo(torch.float32).eps
    worse = {key: (mine[key], torchs[key]) for key in mine if mine[key] > 2 * torchs[key] + floor}
    assert not worse


@pytest.mark.parametrize("name", NAMES)
def test_in_float64_they_are_equal_to_rounding(name):
    built = build(name)
    exact = gradients(built, torch.float64)
    accelerate(built.module)
    # diffusers takes the mean of RMS norms, and turns by rotary angles, in float32.
    bound = 1e-6 if "sd35" in name or "flux" in name else 1e-12
    assert max(errors(gradients(built, torch.float64), exact).values()) < bound


@pytest.mark.parametrize("name", MODELS)
def test_what_is_replaced_and_that_undoing_leaves_no_trace(name):
    built = build(name)
    module = built.module
    before = gradients(built, torch.float32)
    parts = [(type(part), dict(vars(part))) for part in module.modules()]
    keys, parameters = list(module.state_dict()), list(module.parameters())
    accelerated = accelerate(module)
    assert accelerated.replaced == PATCHES[name]
    assert list(module.state_dict()) == keys
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert accelerate(module).replaced == {}
    accelerated.undo()
    assert [(type(part), dict(vars(part))) for part in module.modules()] == parts
    after = gradients(built, torch.float32)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_what_torchs_keeps(name):
    built = build(name)
    plain = built.module
    plain.enable_gradient_checkpointing()
    torchs = saved_bytes(built)
    accelerate(plain)
    assert saved_bytes(built) <= 1.01 * torchs
    again = gradients(built, torch.float32)
    plain.disable_gradient_checkpointing()
    for key, value in gradients(built, torch.float32).items():
        torch.testing.assert_close(again[key], value)


def saved_bytes(built, module=None):
    """Bytes that autograd saves in a forward pass, each storage once, parameters not."""
    module = built.module.float() if module is None else module
    known = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
    found = {}

    def pack(value):
        if value.untyped_storage()._cdata not in known:
            found[value.untyped_storage()._cdata] = value
        return value

    inputs = {name: value.float().requires_grad_() for name, value in built.inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        results = outputs(module, inputs | built.constants)
    del results
    return sum(value.untyped_storage().nbytes() for value in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_less_is_saved(name):
    built = build(name)
    before = saved_bytes(built)
    accelerate(built.module)
    assert saved_bytes(built) < 0.72 * before


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_a_second_time_and_after_a_partial_backward(name):
    """What is made again in the backward pass may be asked for twice."""
    built = build(name)
    accelerate(built.module)
    module = built.module.float()
    inputs = {key: value.float().requires_grad_() for key, value in built.inputs.items()}
    loss = sum(value.square().sum() for value in outputs(module, inputs | built.constants))
    first, *rest = module.parameters()
    torch.autograd.grad(loss, first, retain_graph=True)
    once, again = (
        torch.autograd.grad(loss, rest, retain_graph=True, allow_unused=True) for _ in range(2)
    )
    for a, b in zip(once, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", ["dit_block", "pixart_block", "sd35_block_dual", "flux_block"])
def test_blocks_compile_as_one_graph(name):
    built = build(name)
    accelerate(built.module)
    eager = gradients(built, torch.float32)
    torch._dynamo.reset()

    def compiled(module, inputs):
        return outputs(torch.compile(module, fullgraph=True, backend="aot_eager"), inputs)

    found = gradients(built, torch.float32, compiled)
    assert found.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


def test_a_whole_dit_compiles_as_one_graph():
    built = build("dit")
    accelerate(built.module)
    module = built.module.float().requires_grad_(False)
    eager = outputs(module, floats(built))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for mine, theirs in zip(outputs(compiled, floats(built)), eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def floats(built):
    return {key: value.float() for key, value in built.inputs.items()} | built.constants


@pytest.mark.parametrize("name", MODELS)
def test_autocast_is_as_exact_as_torchs(name):
    built = build(name)
    exact = gradients(built, torch.float64)

    def autocast(module, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return outputs(module, inputs)

    theirs = gradients(built, torch.float32, autocast)
    accelerate(built.module)
    mine = gradients(built, torch.float32, autocast)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in theirs.items()}
    torchs = whole(theirs, exact)
    assert all(error <= 2 * torchs[key] for key, error in whole(mine, exact).items())


@pytest.mark.parametrize(("name", "targets"), [
    ("dit", ["to_q", "to_v", "net.2", "norm1.linear"]),
    ("sd35", ["to_q", "add_k_proj", "net.0.proj", "to_out.0"]),
    ("flux", ["to_q", "proj_mlp", "proj_out"]),
])  # fmt: skip
def test_lora_layers_run_as_they_always_do(name, targets):
    peft = pytest.importorskip("peft")
    built = build(name)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    peft.inject_adapter_in_model(config, built.module)
    exact = gradients(built, torch.float64)
    accelerate(built.module)
    assert max(errors(gradients(built, torch.float64), exact).values()) < 1e-6


def test_a_training_dit_drops_labels_as_diffusers_does():
    built = build("dit")
    built.module.train()
    built.module.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = 0.9

    def seeded(module, inputs):
        torch.manual_seed(5)
        return outputs(module, inputs)

    exact = gradients(built, torch.float64, seeded)
    accelerate(built.module)
    assert max(errors(gradients(built, torch.float64, seeded), exact).values()) < 1e-12


def test_chunked_feed_forwards_and_idle_dropouts_stay_what_they_are():
    built = build("pixart_block")
    built.module.set_chunk_feed_forward(3, 1)
    exact = gradients(built, torch.float64)
    accelerate(built.module)
    assert max(errors(gradients(built, torch.float64), exact).values()) < 1e-12
    built.module.ff.net[1].p = 0.5
    built.module.set_chunk_feed_forward(None)
    first, second = (outputs(built.module, built.inputs | built.constants)[0] for _ in range(2))
    assert first.ne(second).any()


def test_blocks_with_options_that_no_patch_knows_are_left():
    for name, change in {
        "dit_block": lambda block: setattr(block.attn1, "rescale_output_factor", 2.0),
        "pixart_block": lambda block: setattr(block, "pos_embed", torch.nn.Identity()),
        "sd35_block": lambda block: setattr(block.attn.norm_q, "eps", 1e-5),
        "flux_block": lambda block: block.norm2.register_forward_hook(lambda *args: None),
    }.items():
        built = build(name)
        change(built.module)
        assert accelerate(built.module).replaced == {}
