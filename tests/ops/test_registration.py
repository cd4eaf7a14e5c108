"""Every op as torch's own: opcheck, compile without a graph break, meta tensors, DTensor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calls import calls, map_tensors, outcome

from fastdistill import ops
from fastdistill.diffusion import Epsilon, Noise
from fastdistill.functional import distribution_matching_loss
from fastdistill.ops import use_backend
from fastdistill.ops.matching import _matching_cotangent

OPS = list(calls())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(op, backend):
    with use_backend(backend):
        torch.library.opcheck(op.overload, calls(grad=True)[op])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_eager_and_registered_calls_agree(op):
    direct, registered = (outcome(op, run, calls()[op]) for run in (op, op.overload))
    for mine, theirs in zip(direct, registered, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_meta_tensors_give_the_shapes_of_real_ones(op):
    args = calls()[op]
    meta = map_tensors(lambda value: value.to("meta"), args)
    for mine, real in zip(outcome(op, op, meta), outcome(op, op, args), strict=True):
        assert (mine.shape, mine.dtype, mine.device.type) == (real.shape, real.dtype, "meta")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_compiles_without_a_graph_break_at_any_batch(op):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: op(*args), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch in (3, 5):
        found, eager = (outcome(op, run, calls(batch)[op]) for run in (compiled, op))
        for mine, theirs in zip(found, eager, strict=True):
            torch.testing.assert_close(mine, theirs)


def public_losses() -> dict[str, Callable[..., torch.Tensor]]:
    """Every differentiable public function as a scalar of one live tensor."""
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(3, 2, 4, 4, generator=generator) for _ in range(4)]
    a, b = (torch.rand(3, generator=generator) + 0.3 for _ in range(2))
    pair, key, index = ops.Coefficients(a, b), Noise(1).key("x"), torch.arange(3)
    flat = torch.randn(5, 32, generator=generator)
    basis, _ = torch.linalg.qr(flat.T)
    huber = ops.Distance.pseudo_huber(0.3)
    return {
        "renoise": lambda live: ops.renoise(live, a, b, key, index, a).model_input.square().sum(),
        "denoising": lambda live: ops.denoising_cotangent(live, x[0], x[1], pair).loss.sum(),
        "matching": lambda live: ops.matching_cotangent(
            live, x[0], x[1], pair, x[2], pair
        ).loss.sum(),
        "projection": lambda live: ops.projection_cotangents(
            x[0],
            live,
            live * 2,
            pair,
            live.sin(),
            pair,
            distance=huber,
            teacher_uncond=x[1],
            guidance_scale=2.0,
        ).loss.sum(),
        "consistency": lambda live: ops.consistency_cotangent(
            live, x[0], pair, x[1], distance=huber
        ).loss.sum(),
        "transport": lambda live: (
            ops.gaussian_transport(live, flat[0], basis, torch.ones(5), a, b, b, a, denoise=True)
            .denoised.square()
            .sum()
        ),
        "mixture": lambda live: (
            ops.mixture_denoise(live.flatten(1), a, b, flat, torch.ones(5)).denoised.square().sum()
        ),
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", list(public_losses()))
def test_public_functions_compile_with_their_gradients(name, memory_format):
    loss = public_losses()[name]
    live = torch.randn(3, 2, 4, 4).to(memory_format=memory_format).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = [run(live) for run in (loss, compiled)]
    gradients = [torch.autograd.grad(value, live)[0] for value in values]
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().max() > 0


@pytest.mark.slow
def test_a_compiled_training_step_gives_the_eager_gradient():
    """The functional loss inside a compiled function, with inductor, forward and backward."""

    def step(network, x, x_t, teacher, critic, alpha, sigma):
        return distribution_matching_loss(
            network(x), x_t, teacher, critic, alpha, sigma, guidance_scale=1.0
        )

    torch.manual_seed(0)
    network = torch.nn.Linear(8, 8)
    x, x_t, teacher, critic = (torch.randn(4, 8) for _ in range(4))
    alpha, sigma = torch.rand(4) + 0.1, torch.rand(4) + 0.1
    gradients = []
    for run in (step, torch.compile(step, fullgraph=True)):
        network.zero_grad()
        run(network, x, x_t, teacher, critic, alpha, sigma).backward()
        gradients.append(network.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_a_fused_loss_survives_checkpointing_and_vmap_free_retracing():
    from torch.utils.checkpoint import checkpoint

    x, x_t, teacher, critic = (torch.randn(4, 8) for _ in range(4))
    alpha = sigma = torch.full((4,), 0.5)
    x.requires_grad_()

    def loss(sample):
        return distribution_matching_loss(sample, x_t, teacher, critic, alpha, sigma)

    (plain,) = torch.autograd.grad(loss(x), x)
    (again,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    assert torch.equal(plain, again)


def test_a_coefficient_pair_is_enough_for_every_backend():
    """Coefficients may be expanded scalars, as a sampler's constant time makes them."""
    args = list(calls()[_matching_cotangent])
    constant = torch.tensor(0.7).expand(3)
    args[3], args[4] = constant, constant
    results = []
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            results.append(_matching_cotangent(*args)[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
    assert Epsilon().coefficients(constant, constant).a.shape == (3,)


@pytest.mark.slow
def test_sharded_batches_on_two_ranks_equal_one():
    """DTensor inputs sharded over the batch, and the density ratio over a process group."""
    script = Path(__file__).with_name("two_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
