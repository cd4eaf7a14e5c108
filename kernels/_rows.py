"""Tokens [B, T, C] as rows of C channels, and samples' numbers [B, C] that may lie apart."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_LARGEST_ROW = 16_384


def sample_stride(value: torch.Tensor | None) -> int:
    """Elements from one sample's channels to the next's; 0 where all share them, as [C]."""
    return 0 if value is None or value.ndim == 1 else value.stride(0)


def check_row(channels: int) -> None:
    """Raise ValueError where a token does not fit one program."""
    if channels > _LARGEST_ROW:
        raise ValueError(f"tokens have {channels} channels; kernels take {_LARGEST_ROW}")


def tokens_a_program(batch: int, tokens: int) -> int:
    """Tokens whose columns one program sums: more where there are programs enough.

    It depends on the shape alone, and with it the order of additions. 16 tokens' partial sums are
    a sixteenth of what a program reads.
    """
    return next((rows for rows in (16, 32) if batch * tokens <= rows * 1_024), 64)


@triton.jit
def locate_tokens(tokens, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sample of this program, its first token, the index of that in the batch, the lanes."""
    programs = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * ROWS
    return sample, first, sample * tokens + first, tl.arange(0, BLOCK)


@triton.jit
def store_sum(pointer, value, lanes, N: tl.constexpr):
    """This program's share of a sum over the tokens [B, programs, C], float32."""
    tl.store(pointer + tl.program_id(0).to(tl.int64) * N + lanes, value, mask=lanes < N)
