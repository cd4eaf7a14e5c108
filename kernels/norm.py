"""The squared norm of a flat range in one launch: partial sums, added by the last to arrive.

The grid depends on the length alone, never on the device, and so does the order of additions.
1,024 programs of 128 threads are all resident on every data-centre GPU since the A100 where a
thread has at most 64 registers; each walks over the range in steps of the whole grid.

A program takes its ticket after its partial sum is written, and the last one reads them after it
took its own, both with acq_rel: it sees all of them. It alone resets the ticket, which the next
launch of the stream reads.

Bytes moved: the range once, and 4 KB of partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdistill.kernels._sample import arrive_last, check_storage, on_device_of

_PROGRAMS = tl.constexpr(1_024)
_BLOCK_BYTES = 8_192  # four 128-bit loads a thread
_TAIL = tl.constexpr(16)  # what is left over by a multiple of it is read element by element


@triton.jit(do_not_specialize=["blocks", "rest"])
def _squares_kernel(
    value_ptr,
    partial_ptr,
    ticket_ptr,
    out_ptr,
    blocks,
    rest,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # partial[p] = sum of x^2 over the blocks p, p + P, p + 2 P, ...,   P programs
    program, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    pointer = value_ptr + program.to(tl.int64) * BLOCK + lanes
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    for _ in range(program, blocks, programs):
        x = tl.load(pointer).to(tl.float32).reshape([BLOCK // VECTOR, VECTOR])
        total += tl.sum(x * x, axis=1)  # within a thread: a quarter of the registers or less
        pointer += programs.to(tl.int64) * BLOCK
    last = tl.full([], 0.0, tl.float32)
    if program == programs - 1:  # the `rest` < BLOCK elements behind the last block
        tail_ptr, wide = value_ptr + blocks.to(tl.int64) * BLOCK, rest // _TAIL * _TAIL
        x = tl.load(tail_ptr + lanes, mask=lanes < wide, other=0.0)
        x = x.to(tl.float32).reshape([BLOCK // VECTOR, VECTOR])
        total += tl.sum(x * x, axis=1)
        few = tl.arange(0, _TAIL)
        x = tl.load(tail_ptr + wide + few, mask=few < rest - wide, other=0.0).to(tl.float32)
        last = tl.sum(x * x)
    tl.store(partial_ptr + program, tl.sum(total) + last)

    # out = sum of the partial sums
    if arrive_last(ticket_ptr):
        index = tl.arange(0, _PROGRAMS)
        partial = tl.load(partial_ptr + index, mask=index < programs, other=0.0)
        tl.store(out_ptr, tl.sum(partial))


def sum_of_squares(value: torch.Tensor, ticket: torch.Tensor | None = None) -> torch.Tensor:
    """Launch `fastdistill::sum_of_squares`, as `fastdistill.ops.sum_of_squares`."""
    check_storage(value=value)
    block = _BLOCK_BYTES // value.element_size()
    blocks, rest = divmod(value.numel(), block)
    programs = min(max(blocks, 1), _PROGRAMS.value)
    partial = value.new_empty(programs, dtype=torch.float32)
    out = value.new_empty((), dtype=torch.float32)
    with on_device_of(value):
        if ticket is None:
            ticket = torch.zeros(1, dtype=torch.int32, device=value.device)
        _squares_kernel[(programs,)](
            value,
            partial,
            ticket,
            out,
            blocks,
            rest,
            BLOCK=block,
            VECTOR=16 // value.element_size(),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
