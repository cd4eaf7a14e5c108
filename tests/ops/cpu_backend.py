"""What the tests of the C++ backend share: arguments for every op, and what agreement means.

As a program it stores the results of every op, for comparison with other instruction sets.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastdistill.ops import _backend
from fastdistill.ops.adamw import _adamw_ema_
from fastdistill.ops.consistency import _consistency_cotangent
from fastdistill.ops.denoising import _denoising_cotangent
from fastdistill.ops.density_ratio import _density_ratio_weight
from fastdistill.ops.matching import _matching_cotangent
from fastdistill.ops.mixture import _mixture_denoise, _mixture_denoise_backward
from fastdistill.ops.noise import _normal, _uniform
from fastdistill.ops.norm import _sum_of_squares
from fastdistill.ops.projection import _projection_cotangents
from fastdistill.ops.renoise import _renoise

needs_extension = pytest.mark.skipif(
    _backend.extension_path() is None, reason="the C++ extension is not built"
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = [(5, 1), (5, 7), (3, 11, 93), (2, 4, 32, 32), (1, 65536 + 3)]
#         x0    x_t   teacher/prediction, critic, unconditional outputs, coefficients
STORAGE = {
    "float32": (F32, F32, F32, F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16, BF16, BF16, F32),
    "float16": (F16, F16, F16, F16, F16, F16),
    "mixed": (F32, F16, BF16, F16, F64, BF16),
    "mixed_bfloat16": (BF16, F32, F64, F32, F16, F64),
    "float64": (F64, F64, F64, F64, F64, F64),
    "mixed_float64": (F64, F32, BF16, F16, F32, F32),
}
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_storage = pytest.mark.parametrize("storage", list(STORAGE))


def cpu(op):
    """The C++ implementation of an op."""
    assert _backend.load_extension()
    return getattr(torch.ops.fastdistill_cpu, op.name).default


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads inside the block; tests run on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key(seed: int = 1, stream: int = 2, step: int = 3) -> Tensor:
    return torch.tensor([seed, stream, step])


def in_float64(value):
    """The same argument in double precision."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return F64 if isinstance(value, torch.dtype) else value


def error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute error of the finite elements; the others must agree in kind."""
    finite = truth.isfinite()
    assert torch.equal(finite, value.isfinite())
    torch.testing.assert_close(value[~finite].double(), truth[~finite], equal_nan=True)
    return (value.double() - truth)[finite].abs().amax().item() if finite.any() else 0.0


def check(op, *args, slack: float = 0.0, places: float = 1.0) -> None:
    """The C++ results have the reference's shapes and dtypes and at most twice its error.

    ``places`` are last places of the compute type that are allowed beside it: more than one where
    sums of opposite sign meet, and the reference may be exact by chance.
    """
    ours, plain = cpu(op)(*args), op.reference(*args)
    truth = op.reference(*map(in_float64, args))
    for value, reference, exact in zip(ours, plain, truth, strict=True):
        assert value.shape == reference.shape
        assert value.dtype == reference.dtype
        if value.numel() == 0:
            continue
        largest = exact[exact.isfinite()].abs().amax().item() if exact.isfinite().any() else 0.0
        # In float64 the reference is its own truth, up to the order of its sums.
        double = args[0].dtype == F64
        place = 1e-12 * max(largest, 1) if double else places * torch.finfo(F32).eps * largest
        assert error(value, exact) <= 2 * error(reference, exact) + place + slack


def matching_args(shape, storage="float32", options="all", dtype=None):
    """Arguments of `matching_cotangent`; `options` names which optional ones are present."""
    x0, x_t, teacher, critic, uncond, coefficient = STORAGE[storage]
    batch = shape[0]
    present = options == "all"
    return (
        random(*shape, dtype=x0, seed=1),
        random(*shape, dtype=x_t, seed=2),
        random(*shape, dtype=teacher, seed=3),
        random(batch, dtype=coefficient, seed=4),
        random(batch, dtype=coefficient, seed=5),
        random(*shape, dtype=critic, seed=6),
        random(batch, dtype=coefficient, seed=7),
        random(batch, dtype=coefficient, seed=8),
        random(*shape, dtype=uncond, seed=9) if present or options == "guided" else None,
        7.5 if present or options == "guided" else 1.0,
        random(*shape, dtype=uncond, seed=10) if present else None,
        0.3 if present else 0.0,
        random(batch, dtype=coefficient, seed=11).abs() if present else None,
        options != "plain",
        1.0 / max(batch, 1),
        dtype or x0,
    )


def denoising_args(shape, storage="float32", weighted=True):
    x0, x_t, prediction, _, _, coefficient = STORAGE[storage]
    return (
        random(*shape, dtype=prediction, seed=1),
        random(*shape, dtype=x0, seed=2),
        random(*shape, dtype=x_t, seed=3),
        random(shape[0], dtype=coefficient, seed=4),
        random(shape[0], dtype=coefficient, seed=5),
        random(shape[0], dtype=coefficient, seed=6).abs() if weighted else None,
        0.25,
    )


def renoise_args(shape, storage="float32", scaled=True, input_dtype=BF16):
    dtype, coefficient = STORAGE[storage][0], STORAGE[storage][-1]
    return (
        random(*shape, dtype=dtype, seed=1),
        random(shape[0], dtype=coefficient, seed=2),
        random(shape[0], dtype=coefficient, seed=3),
        key(),
        torch.arange(shape[0]) + 1000,
        random(shape[0], dtype=coefficient, seed=4) if scaled else None,
        input_dtype,
    )


def density_ratio_args(logits=F32, history=F32, samples=37, heads=3, exponent=-1.5):
    seen = torch.stack((3 * random(8, seed=3).abs(), 2 * random(8, seed=4).abs()), dim=1)
    return (
        3 * random(samples, heads, dtype=logits, seed=1),
        torch.randint(0, 8, (samples,), generator=torch.Generator().manual_seed(2)),
        seen.to(history),
        *(0.7, 1.0, 0.5, exponent, 0.9, 1.0, 10.0, 0.1, 20.0),
    )


DISTANCES = {
    "squared": (2.0, 0.0, False),
    "huber": (1.0, 0.03, False),
    "norm": (1.0, 0.0, False),
    "power": (1.5, 0.0, False),
    "l1": (1.0, 0.0, True),
}


def projection_args(shape, storage="float32", distance="squared", options="all"):
    """Arguments of `projection_cotangents`; `options` names which optional ones are present."""
    x0, x_t, teacher, critic, uncond, coefficient = STORAGE[storage]
    batch = shape[0]
    present = options == "all"
    return (
        random(*shape, dtype=x0, seed=1),
        random(*shape, dtype=x_t, seed=2),
        random(*shape, dtype=teacher, seed=3),
        random(batch, dtype=coefficient, seed=4),
        random(batch, dtype=coefficient, seed=5),
        random(*shape, dtype=critic, seed=6),
        random(batch, dtype=coefficient, seed=7),
        random(batch, dtype=coefficient, seed=8),
        random(*shape, dtype=uncond, seed=9) if present or options == "guided" else None,
        4.5 if present or options == "guided" else 1.0,
        random(batch, dtype=coefficient, seed=10).abs() if present else None,
        random(batch, dtype=coefficient, seed=11).abs() + 0.1 if present else None,
        *DISTANCES[distance],
        1.2 if present else 1.0,
        present,
        1.0 / max(batch, 1),
    )


def consistency_args(shape, storage="float32", distance="huber", options="all"):
    x_t, target_x, prediction, target, _, coefficient = STORAGE[storage]
    raw, weighted = options in ("all", "raw"), options == "all"
    return (
        random(*shape, dtype=prediction, seed=1),
        random(*shape, dtype=x_t, seed=2),
        random(shape[0], dtype=coefficient, seed=3),
        random(shape[0], dtype=coefficient, seed=4),
        random(*shape, dtype=target, seed=5),
        random(*shape, dtype=target_x, seed=6) if raw else None,
        random(shape[0], dtype=coefficient, seed=7) if raw else None,
        random(shape[0], dtype=coefficient, seed=8) if raw else None,
        random(shape[0], dtype=coefficient, seed=9).abs() if weighted else None,
        *DISTANCES[distance],
        0.25,
    )


def mixture_args(shape, storage="float32", isotropic=False, components=6):
    """Arguments of `mixture_denoise`, with components near enough to share the samples."""
    x, _, means, _, variances, coefficient = STORAGE[storage]
    elements = math.prod(shape[1:])
    spread = 1 if isotropic else elements
    return (
        random(*shape, dtype=x, seed=1),
        random(shape[0], seed=2).abs().to(coefficient) + 0.5,
        random(shape[0], seed=3).abs().to(coefficient) + 0.5,
        (elements**-0.5 * random(components, elements, seed=4)).to(means),
        random(components, spread, seed=5).abs().to(variances),
        random(components, seed=6).log_softmax(0),
    )


def mixture_backward_args(shape, storage="float32", isotropic=False):
    """Arguments of `mixture_denoise_backward` at the same samples."""
    args = mixture_args(shape, storage, isotropic)
    compute = torch.promote_types(args[0].dtype, F32)
    posterior = random(shape[0], 6, seed=7).softmax(1).to(compute)
    return (
        *args[:5],
        posterior,
        random(*shape, dtype=STORAGE[storage][1], seed=8),
        random(shape[0], seed=9),
    )


def adamw_args(size, gradient=F32):
    """Arguments of `adamw_ema_` with every option, on new tensors."""
    state = [random(size, seed=seed).abs() for seed in range(6)]
    scalars = [torch.tensor(value) for value in (4.0, 2.0, 0.5)]
    copy = torch.zeros(size, dtype=BF16)
    return (
        *(state[0], state[1].to(gradient), state[2], state[3], torch.tensor(3.0)),
        *(state[4:], copy, None, None, torch.zeros(2, dtype=torch.int32), *scalars, key(), None),
        *([0, 5], [1, 0], [1e-3, 1e-2], [0.0, 0.1]),
        *(0.9, 0.999, 1e-8, 1.0, [0.9, 0.99], True),
    )


def updated(args) -> list[Tensor]:
    """Everything that `adamw_ema_` changes, after the C++ update."""
    cpu(_adamw_ema_)(*args)
    return [args[0], *args[2:4], args[4].reshape(1), *args[5], args[6]]


def every_op(shape) -> list[Tensor]:
    """All results of all ops, for comparisons bit by bit."""
    results = []
    for storage in STORAGE:
        results += cpu(_matching_cotangent)(*matching_args(shape, storage))
        results += cpu(_denoising_cotangent)(*denoising_args(shape, storage))
        results += cpu(_renoise)(*renoise_args(shape, storage))
        for isotropic in (False, True):
            results += cpu(_mixture_denoise)(*mixture_args(shape, storage, isotropic))
            args = mixture_backward_args(shape, storage, isotropic)
            results.append(cpu(_mixture_denoise_backward)(*args))
        for distance in DISTANCES:
            results += cpu(_projection_cotangents)(*projection_args(shape, storage, distance))
            results += cpu(_consistency_cotangent)(*consistency_args(shape, storage, distance))
    for dtype in (F32, BF16, F16, F64):
        for op in (_normal, _uniform):
            results.append(cpu(op)(key(), torch.arange(shape[0]), list(shape[1:]), dtype))
        results.append(cpu(_sum_of_squares)(random(*shape).to(dtype)).reshape(1))
        results += updated(adamw_args(math.prod(shape), dtype))
    return [*results, *cpu(_density_ratio_weight)(*density_ratio_args())]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


if __name__ == "__main__":
    torch.save(every_op((3, 5003)), sys.argv[1])
