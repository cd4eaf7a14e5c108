"""Kernels with the mistakes that the certificate must find; each is correct and merely bad."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _runtime_length(x_ptr, number_ptr, out_ptr, n, BLOCK: tl.constexpr, PARTS: tl.constexpr,
                    N: tl.constexpr):  # fmt: skip
    # A length that Triton cannot know to be a multiple of 16: scalar accesses.
    lanes = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * N
    x = tl.load(x_ptr + start + lanes, mask=lanes < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + lanes, (x + 1.0).to(out_ptr.dtype.element_ty), mask=lanes < n)


@triton.jit
def _second_read(x_ptr, number_ptr, out_ptr, n, BLOCK: tl.constexpr, PARTS: tl.constexpr,
                 N: tl.constexpr):  # fmt: skip
    # The same elements loaded again after a store that might have changed them.
    lanes = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * N
    mean = tl.sum(tl.load(x_ptr + start + lanes).to(tl.float32)) / N
    tl.store(number_ptr + tl.program_id(0).to(tl.int64), mean)
    x = tl.load(x_ptr + start + lanes).to(tl.float32)
    tl.store(out_ptr + start + lanes, (x - mean).to(out_ptr.dtype.element_ty))


@triton.jit
def _float64(x_ptr, number_ptr, out_ptr, n, BLOCK: tl.constexpr, PARTS: tl.constexpr,
             N: tl.constexpr):  # fmt: skip
    # A float64 coefficient that was not cast drags the arithmetic along.
    lanes = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * N
    number = tl.load(number_ptr + tl.program_id(0).to(tl.int64))
    x = number * tl.load(x_ptr + start + lanes).to(tl.float32)
    tl.store(out_ptr + start + lanes, x.to(out_ptr.dtype.element_ty))


@triton.jit
def _offset(x_ptr, number_ptr, out_ptr, n, BLOCK: tl.constexpr, PARTS: tl.constexpr,
            N: tl.constexpr):  # fmt: skip
    # A 32-bit offset of the sample: wraps past 2^31 elements.
    lanes = tl.arange(0, BLOCK)
    start = tl.program_id(0) * N
    x = tl.load(x_ptr + start + lanes).to(tl.float32)
    tl.store(out_ptr + start + lanes, x.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n"])
def _update(x_ptr, number_ptr, out_ptr, n, BLOCK: tl.constexpr, PARTS: tl.constexpr,
            N: tl.constexpr):  # fmt: skip
    # A flat range whose length is not known to be a multiple of 16, with a masked tail everywhere.
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < n, other=0.0)
    tl.store(x_ptr + element, x * 0.5, mask=element < n)


_KERNELS = {
    "bad_runtime_length": _runtime_length,
    "bad_second_read": _second_read,
    "bad_float64": _float64,
    "bad_offset": _offset,
    "bad_update": _update,
}


def launch(name: str, x: torch.Tensor, number: torch.Tensor) -> None:
    """Launch the bad kernel ``name`` on samples ``x`` [B, ...]."""
    elements = x[0].numel()
    if name == "bad_float64":
        number = number.double()
    n = elements - (name == "bad_runtime_length")
    constants = {"BLOCK": elements, "PARTS": 1, "N": elements}
    _KERNELS[name][(len(x),)](x, number, torch.empty_like(x), n, **constants, num_warps=4)
