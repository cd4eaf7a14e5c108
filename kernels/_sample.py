"""How a batch of samples becomes programs, and how a program finds and reads its elements.

A sample of N elements is `parts` blocks, one program each; program `sample * parts + part` of a
one-dimensional grid. N is a constexpr, so that the tail mask of a length that is a multiple of 16
keeps 128-bit accesses. Offsets inside a sample are int32 (checked), those of samples are int64.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

_STORAGE = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_SAMPLE = 2**31 - 2**14
_SHARES = tl.constexpr(1_024)

# Warps of a block: 16 elements a thread at 32 lanes a warp, so that a 16-bit block still has a
# 128-bit vector for each thread where a warp is 64 lanes (CDNA); never more than 1,024 threads.
_WARPS = {1_024: 2, 2_048: 4, 4_096: 8, 8_192: 16, 16_384: 16}


class Cut(NamedTuple):
    """How samples are cut into programs."""

    parts: int
    """Programs a sample"""
    options: dict[str, int | bool]
    """Constants of the kernel (N, BLOCK, PARTS) and launch options, to be passed as keywords"""


@functools.cache
def cut(elements: int, one_program: int = 16_384, block: int = 4_096) -> Cut:
    """Cut of a sample of ``elements``: one program up to ``one_program``, ``block`` each above.

    16,384 elements are the most that fit the registers of one program: 65,536 spill at every
    warp count. FP fusion is pinned because Triton 3.10 changes its default.
    """
    if elements > _LARGEST_SAMPLE:
        raise ValueError(f"a sample has {elements} elements; kernels take {_LARGEST_SAMPLE}")
    if elements <= one_program:
        block = max(16, triton.next_power_of_2(elements))
    parts = triton.cdiv(elements, block)
    constants = {"N": elements, "BLOCK": block, "PARTS": parts}
    return Cut(parts, {**constants, "num_warps": _WARPS.get(block, 1), "enable_fp_fusion": True})


def check_storage(**values: torch.Tensor | torch.dtype | None) -> None:
    """Raise ValueError unless each tensor (contiguous) or dtype is one that kernels store."""
    for name, value in values.items():
        if value is None:
            continue
        dtype = value if isinstance(value, torch.dtype) else value.dtype
        if dtype not in _STORAGE:
            raise ValueError(
                f"{name} is {dtype}; Triton kernels store float32, bfloat16 and float16 and "
                'compute in float32. Use `with fastdistill.ops.use_backend("reference")` for others'
            )
        if isinstance(value, torch.Tensor) and not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}; expected a contiguous tensor")


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which kernels launch on the device of ``tensor``, free where that is current."""
    device = tensor.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


@functools.cache
def _target_of(device: int) -> GPUTarget:
    return triton.runtime.driver.active.get_current_target()


def target() -> GPUTarget:
    """What launches on the current device compile for; backend "interpreter" where they do not."""
    if not isinstance(locate, JITFunction):
        return GPUTarget("interpreter", 0, 32)
    return _target_of(triton.runtime.driver.active.get_current_device())


@triton.jit
def locate(N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Sample and part of this program, offset of its first element, its lanes, which exist."""
    program = tl.program_id(0)
    sample = (program // PARTS).to(tl.int64)
    part = program % PARTS
    lanes = tl.arange(0, BLOCK)
    return sample, part, sample * N + part * BLOCK, lanes, lanes < N - part * BLOCK


@triton.jit
def load_block(pointer, start, lanes, exists):
    """Elements of this program in float32, 0 where they do not exist."""
    return tl.load(pointer + start + lanes, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_number(pointer, sample):
    """Coefficient of one sample in float32."""
    return tl.load(pointer + sample).to(tl.float32)


@triton.jit
def add_shares(pointer, PARTS: tl.constexpr):
    """Sum, in a fixed order, of the numbers that the parts of one sample have left."""
    whole = 0.0
    for first in range(0, PARTS, _SHARES):
        share = first + tl.arange(0, _SHARES)
        whole += tl.sum(tl.load(pointer + share, mask=share < PARTS, other=0.0))
    return whole


@triton.jit
def arrive_last(ticket_ptr):
    """Whether this program is the last of the grid to come here; the last one resets the ticket.

    What any thread of any program read or wrote before it came here, it did before what the last
    program does next: the barrier orders the threads of a program, acq_rel the programs.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last
