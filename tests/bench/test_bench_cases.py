"""Every case of every op at tiny sizes: its variants agree with the float64 reference.

On a machine with a GPU, under TRITON_INTERPRET=0, the same on the GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from bench.harness import CEILINGS, OURS, footprint, generator, identity, prove
from bench.suite import OPS

ON_GPU = torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SMALL = [case for cases in OPS.values() for case in cases(DEVICE, True)]


def named(case):
    return "-".join(identity(case))


def faults(case, names):
    torch.manual_seed(20_261_124)  # torch's noise must not be the numbers that inputs are made of
    return prove(case, names, DEVICE)


@pytest.mark.parametrize("case", SMALL, ids=named)
def test_ours_equals_the_reference(case):
    assert faults(case, [OURS]) == {}


@pytest.mark.parametrize("case", SMALL, ids=named)
def test_eager_rivals_compute_the_same(case):
    names = [name for name in case.variants if name != OURS and "compile" not in name]
    assert names or case.op in ("adamw_ema_", "optimizer", "mixture_denoise")
    assert faults(case, names) == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SMALL if case.op != "optimizer"], ids=named)
def test_compiled_rivals_compute_the_same(case):
    torch.compiler.reset()
    names = [name for name in case.variants if "compile" in name]
    assert names
    assert faults(case, names) == {}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_full_sizes_state_their_bytes(op, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    found = list(OPS[op](torch.device(device), False))
    assert len({identity(case) for case in found}) == len(found)
    for case in found:
        assert next(iter(case.variants)) == OURS
        assert case.ceiling in CEILINGS
        assert case.bytes_moved > 0


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("normal", "density_ratio_weight")])
def test_an_op_moves_no_less_than_it_reads(op):
    """Beside the noise level and coefficients, whose [B] numbers no byte model counts."""
    case = next(OPS[op](DEVICE, True))
    unread = {"denoising_cotangent": 1, "adamw_ema_": 0}.get(op, 0)
    inputs = case.make(generator(DEVICE))
    read = footprint(inputs) - unread * footprint(inputs[-1:])
    assert case.bytes_moved >= 0.9 * read
