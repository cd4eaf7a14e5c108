"""The affine map of a Gaussian's exact diffusion: products with a tall basis and its transpose.

A program of the first launch has a range of the sample and a block of directions, and leaves its
share of c; the shares are summed in a fixed order by torch, since every program of the second
launch needs all of c and would otherwise read the shares of all. A program of that one has a piece
of the samples and walks along the directions, with the mean and the rest in its epilogue.

A float32 basis is multiplied as three TF32 products (IEEE products on AMD), which keeps float32
accuracy; factors of a 16-bit basis are rounded to its dtype. Sums are float32.

Bytes moved: the basis twice, x twice, each result once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import (
    check_storage,
    load_block,
    load_number,
    on_device_of,
    target,
)

_DIRECTIONS = 64
_ELEMENTS = 64
_PROGRAMS = 256  # of the first launch, about; fewer where a range would be below _SHORTEST
_SHORTEST = 4 * _ELEMENTS
# Samples of a program, and its warps; 64 spill with a float32 basis, which is multiplied thrice.
_WARPS = {"cuda": {16: 4, 32: 8, 64: 8}, "hip": {16: 2, 32: 2, 64: 4}}
_PRECISION = {"cuda": "tf32x3", "hip": "ieee"}


@triton.jit
def _multiply(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right, factors in the basis's dtype and sums in float32."""
    if PRECISION == "upcast":  # Triton's interpreter cannot multiply bfloat16 matrices
        left, right = left.to(tl.float32), right.to(tl.float32)
        return tl.dot(left, right, total, input_precision="ieee")
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _locate(batch, SAMPLES: tl.constexpr):
    """Samples of this program, which exist, and its block of the basis, which neighbours share."""
    groups = tl.cdiv(batch, SAMPLES)
    sample = tl.program_id(0) % groups * SAMPLES + tl.arange(0, SAMPLES)
    return sample.to(tl.int64), sample < batch, tl.program_id(0) // groups


@triton.jit
def _numbers(pointer, sample, samples):
    """Coefficients of the samples of this program  # [SAMPLES, 1]"""
    return tl.load(pointer + sample, mask=samples, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _centred(x_ptr, mean_ptr, shift, sample, samples, lane, N: tl.constexpr):
    """x - shift mu of samples x elements in float32, and mu; 0 where they do not exist."""
    exists = samples[:, None] & (lane < N)[None, :]
    x = tl.load(x_ptr + sample[:, None] * N + lane[None, :], mask=exists, other=0.0)
    mean = tl.load(mean_ptr + lane, mask=lane < N, other=0.0).to(tl.float32)[None, :]
    return x.to(tl.float32) - shift * mean, mean, exists


@triton.jit
def _basis(basis_ptr, first, direction, N: tl.constexpr, R: tl.constexpr, ELEMENTS: tl.constexpr):
    """ELEMENTS rows of the basis from row ``first`` on, at the given directions."""
    row = tl.arange(0, ELEMENTS)
    exists = (row < N - first)[:, None] & (direction < R)[None, :]
    pointer = basis_ptr + first.to(tl.int64) * R
    return tl.load(pointer + row[:, None] * R + direction[None, :], mask=exists, other=0.0)


@triton.jit(do_not_specialize=["batch"])
def _project_kernel(
    x_ptr,
    mean_ptr,
    basis_ptr,
    shift_ptr,
    c_ptr,
    batch,
    PRECISION: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    RANGE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    # c[range, i] = (x_i - shift_i mu) U over the elements of one range
    BLOCKS: tl.constexpr = (R + DIRECTIONS - 1) // DIRECTIONS
    sample, samples, block = _locate(batch, SAMPLES)
    direction = block % BLOCKS * DIRECTIONS + tl.arange(0, DIRECTIONS)
    part = block // BLOCKS
    shift = _numbers(shift_ptr, sample, samples)
    c = tl.zeros([SAMPLES, DIRECTIONS], tl.float32)
    for step in range(0, RANGE, ELEMENTS):
        first = part * RANGE + step
        lane = first + tl.arange(0, ELEMENTS)
        centred, _, _ = _centred(x_ptr, mean_ptr, shift, sample, samples, lane, N)
        basis = _basis(basis_ptr, first, direction, N, R, ELEMENTS)
        c = _multiply(centred.to(basis.dtype), basis, c, PRECISION)
    pointer = c_ptr + part.to(tl.int64) * batch * R + sample[:, None] * R + direction[None, :]
    tl.store(pointer, c, mask=samples[:, None] & (direction < R)[None, :])


@triton.jit
def _coefficients_kernel(
    c_ptr,
    rest_gain_ptr,
    gains_ptr,
    second_rest_gain_ptr,
    second_gains_ptr,
    coefficients_ptr,
    stride,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # coefficients[map, i] = (gains_i - rest_i) sum over ranges of c[range, i]
    i = (tl.program_id(0) // BLOCKS).to(tl.int64)
    direction = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    exists = direction < R
    c = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        c += tl.load(c_ptr + part * stride + i * R + direction, mask=exists, other=0.0)
    excess = load_block(gains_ptr, i * R, direction, exists) - load_number(rest_gain_ptr, i)
    pointer = coefficients_ptr + i * R + direction
    tl.store(pointer, (excess * c).to(coefficients_ptr.dtype.element_ty), mask=exists)
    if second_gains_ptr is not None:
        excess = load_block(second_gains_ptr, i * R, direction, exists)
        excess -= load_number(second_rest_gain_ptr, i)
        coefficients = (excess * c).to(coefficients_ptr.dtype.element_ty)
        tl.store(pointer + stride, coefficients, mask=exists)


@triton.jit(do_not_specialize=["batch"])
def _map_kernel(
    x_ptr,
    mean_ptr,
    basis_ptr,
    shift_ptr,
    mean_gain_ptr,
    rest_gain_ptr,
    second_mean_gain_ptr,
    second_rest_gain_ptr,
    coefficients_ptr,
    out_ptr,
    second_ptr,
    batch,
    stride,
    PRECISION: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    SAMPLES: tl.constexpr,
    ELEMENTS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
):
    # y = mean_gain mu + rest_gain (x - shift mu) + U coefficients,   once or twice
    sample, samples, block = _locate(batch, SAMPLES)
    first = block * ELEMENTS
    y = tl.zeros([SAMPLES, ELEMENTS], tl.float32)
    if second_ptr is not None:
        z = tl.zeros([SAMPLES, ELEMENTS], tl.float32)
    for step in range(0, R, DIRECTIONS):
        direction = step + tl.arange(0, DIRECTIONS)
        exists = samples[:, None] & (direction < R)[None, :]
        pointer = coefficients_ptr + sample[:, None] * R + direction[None, :]
        basis = tl.trans(_basis(basis_ptr, first, direction, N, R, ELEMENTS))
        y = _multiply(tl.load(pointer, mask=exists, other=0.0), basis, y, PRECISION)
        if second_ptr is not None:
            second = tl.load(pointer + stride, mask=exists, other=0.0)
            z = _multiply(second, basis, z, PRECISION)
    lane = first + tl.arange(0, ELEMENTS)
    shift = _numbers(shift_ptr, sample, samples)
    centred, mean, exists = _centred(x_ptr, mean_ptr, shift, sample, samples, lane, N)
    y += _numbers(mean_gain_ptr, sample, samples) * mean
    y += _numbers(rest_gain_ptr, sample, samples) * centred
    pointer = sample[:, None] * N + lane[None, :]
    tl.store(out_ptr + pointer, y.to(out_ptr.dtype.element_ty), mask=exists)
    if second_ptr is not None:
        z += _numbers(second_mean_gain_ptr, sample, samples) * mean
        z += _numbers(second_rest_gain_ptr, sample, samples) * centred
        tl.store(second_ptr + pointer, z.to(second_ptr.dtype.element_ty), mask=exists)


def gaussian_transport(
    x: torch.Tensor,
    mean: torch.Tensor,
    basis: torch.Tensor,
    shift: torch.Tensor,
    mean_gain: torch.Tensor,
    rest_gain: torch.Tensor,
    gains: torch.Tensor,
    second_mean_gain: torch.Tensor | None,
    second_rest_gain: torch.Tensor | None,
    second_gains: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `fastdistill::gaussian_transport`, as `fastdistill.ops.gaussian_transport`."""
    check_storage(x=x, mean=mean, basis=basis)
    batch, (elements, directions) = x.shape[0], basis.shape
    out, wanted = torch.empty_like(x), second_gains is not None
    second = x.new_empty(x.shape if wanted else (batch, 0))
    if x.numel() == 0:
        return out, second
    most = 64 if basis.element_size() == 2 else 32
    samples = min(max(16, triton.next_power_of_2(batch)), most)
    blocks = triton.cdiv(directions, _DIRECTIONS)
    parts = min(triton.cdiv(_PROGRAMS, blocks), triton.cdiv(elements, _SHORTEST))
    length = triton.cdiv(triton.cdiv(elements, parts), _ELEMENTS) * _ELEMENTS
    parts = triton.cdiv(elements, length)
    c = x.new_empty(parts, batch, directions, dtype=torch.float32)
    coefficients = x.new_empty(1 + wanted, batch, directions, dtype=basis.dtype)
    given = (x, mean, basis, shift.contiguous())
    means, rests, spectra = (
        tuple(None if value is None else value.contiguous() for value in pair)
        for pair in (
            (mean_gain, second_mean_gain),
            (rest_gain, second_rest_gain),
            (gains, second_gains),
        )
    )
    options = {
        "N": elements,
        "R": directions,
        "SAMPLES": samples,
        "ELEMENTS": _ELEMENTS,
        "DIRECTIONS": _DIRECTIONS,
        "enable_fp_fusion": True,
    }
    with on_device_of(x):
        backend = target().backend
        options["PRECISION"] = _PRECISION.get(backend, "upcast")
        options["num_warps"] = _WARPS.get(backend, _WARPS["cuda"])[samples]
        groups = triton.cdiv(batch, samples)
        _project_kernel[(groups * parts * blocks,)](*given, c, batch, RANGE=length, **options)
        _coefficients_kernel[(batch * blocks,)](
            c,
            *(rests[0], spectra[0], rests[1], spectra[1]),
            coefficients,
            batch * directions,
            PARTS=parts,
            R=directions,
            BLOCK=_DIRECTIONS,
            BLOCKS=blocks,
            num_warps=1,
            enable_fp_fusion=True,
        )
        _map_kernel[(groups * triton.cdiv(elements, _ELEMENTS),)](
            *given,
            *(means[0], rests[0], means[1], rests[1]),
            coefficients,
            out,
            second if wanted else None,
            batch,
            batch * directions,
            **options,
        )
    return out, second
