"""Every op as torch's own: opcheck, compile without a graph break, meta tensors, DTensor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdistill.diffusion import Epsilon, Noise
from fastdistill.functional import distribution_matching_loss
from fastdistill.ops import use_backend
from fastdistill.ops.denoising import _denoising_cotangent
from fastdistill.ops.density_ratio import _density_ratio_weight
from fastdistill.ops.matching import _matching_cotangent
from fastdistill.ops.noise import _normal, _uniform
from fastdistill.ops.renoise import _renoise


def arguments(batch: int = 3, dtype: torch.dtype = torch.float32, grad: bool = False) -> dict:
    """A call of every op, by op."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(batch, 2, 4, 4, generator=generator).to(dtype) for _ in range(5)]
    a, b = torch.rand(batch, generator=generator), torch.rand(batch, generator=generator)
    key, index = Noise(1).key("x"), torch.arange(batch)
    logits = torch.randn(batch, 2, generator=generator)
    bins = index % 4
    live = x[0].clone().requires_grad_(grad)
    return {
        _normal: (key, index, [2, 3], dtype),
        _uniform: (key, index, [5], torch.float32),
        _renoise: (live, a, b, key, index, a, torch.bfloat16),
        _denoising_cotangent: (live, x[1], x[2], a, b, a, 0.5),
        _matching_cotangent: (
            *(live, x[1], x[2], a, b, x[3], a, b, x[4], 2.0, None, 0.0, a, True, 0.5),
            torch.float32,
        ),
        _density_ratio_weight: (
            *(logits, bins, torch.ones(4, 2), 1.0, 1.0, 1.0, -1.0, 0.9, 1.0, 10.0, 0.1),
            20.0,
        ),
    }


OPS = list(arguments())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(op, backend):
    with use_backend(backend):
        torch.library.opcheck(op.overload, arguments(grad=True)[op])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_eager_and_registered_calls_agree(op):
    args = arguments()[op]
    direct, registered = op(*args), op.overload(*args)
    for mine, theirs in zip(_leaves(direct), _leaves(registered), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_meta_tensors_give_the_shapes_of_real_ones(op):
    args = arguments()[op]
    meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in args]
    for mine, real in zip(_leaves(op(*meta)), _leaves(op(*args)), strict=True):
        assert (mine.shape, mine.dtype, mine.device.type) == (real.shape, real.dtype, "meta")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_compiles_without_a_graph_break_at_any_batch(op):
    compiled = torch.compile(
        lambda *args: op(*args), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch in (3, 5):
        args = arguments(batch)[op]
        for mine, eager in zip(_leaves(compiled(*args)), _leaves(op(*args)), strict=True):
            torch.testing.assert_close(mine, eager)


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
    args = list(arguments()[_matching_cotangent])
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


def _leaves(result):
    return result if isinstance(result, tuple) else (result,)
