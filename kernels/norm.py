"""The squared norm of a flat range: partial sums of a fixed grid, then one program that adds them.

The grid depends on the length alone, never on the device, and so does the order of additions.
1,024 programs of 128 threads are all resident on every data-centre GPU since the A100 where a
thread has at most 64 registers; each walks over the range in steps of the whole grid.

Bytes moved: the range once, and 4 KB of partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import check_storage, on_device_of

_PROGRAMS = tl.constexpr(1_024)
_BLOCK_BYTES = 8_192  # four 128-bit loads a thread


@triton.jit(do_not_specialize=["blocks"])
def _partial_squares_kernel(
    value_ptr, partial_ptr, blocks, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    # partial[p] = sum of x^2 over the blocks p, p + P, p + 2 P, ...,   P programs
    program, programs = tl.program_id(0), tl.num_programs(0)
    pointer = value_ptr + program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    for _ in range(program, blocks, programs):
        x = tl.load(pointer).to(tl.float32).reshape([BLOCK // VECTOR, VECTOR])
        total += tl.sum(x * x, axis=1)  # within a thread: a quarter of the registers or less
        pointer += programs.to(tl.int64) * BLOCK
    tl.store(partial_ptr + program, tl.sum(total))


@triton.jit(do_not_specialize=["partials"])
def _squares_kernel(value_ptr, partial_ptr, out_ptr, partials, start, length, BLOCK: tl.constexpr):
    # out = sum of the partial sums + sum of x^2 over the last `length` < BLOCK elements
    lanes, index = tl.arange(0, BLOCK), tl.arange(0, _PROGRAMS)
    x = tl.load(value_ptr + start + lanes, mask=lanes < length, other=0.0).to(tl.float32)
    partial = tl.load(partial_ptr + index, mask=index < partials, other=0.0)
    tl.store(out_ptr, tl.sum(partial) + tl.sum(x * x))


def sum_of_squares(value: torch.Tensor) -> torch.Tensor:
    """Launch `fastdistill::sum_of_squares`, as `fastdistill.ops.sum_of_squares`."""
    check_storage(value=value)
    block = _BLOCK_BYTES // value.element_size()
    blocks, rest = divmod(value.numel(), block)
    programs = min(blocks, _PROGRAMS.value)
    options = {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}
    partial = value.new_empty(programs, dtype=torch.float32)
    out = value.new_empty((), dtype=torch.float32)
    with on_device_of(value):
        if blocks > 0:
            vector = 16 // value.element_size()
            _partial_squares_kernel[(programs,)](value, partial, blocks, VECTOR=vector, **options)
        _squares_kernel[(1,)](value, partial, out, programs, blocks * block, rest, **options)
    return out
