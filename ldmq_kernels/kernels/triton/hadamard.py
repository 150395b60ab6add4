"""Hadamard rotation of a tile's channels in registers, with the signs and the order of sums of `numerics.hadamard`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_pairs(y: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SIZE: tl.constexpr) -> tl.tensor:
    """Sums of neighbours, then their differences, in each block of SIZE."""
    even, odd = tl.split(tl.reshape(y, (BLOCK_M * BLOCK_C // SIZE, SIZE // 2, 2)))
    return tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (BLOCK_M, BLOCK_C))


@triton.jit
def rotate(
    y: tl.tensor,  # (BLOCK_M, BLOCK_C) float32, whose first channel begins a block
    channel: tl.tensor,  # (1, BLOCK_C)
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SIZE: tl.constexpr,  # of a block, up to 32; 1 rotates nothing
) -> tl.tensor:
    """H y at each row."""
    if SIZE > 1:
        pairs = channel & (SIZE - 1)
        pairs = pairs & (pairs >> 1)
        odd = pairs ^ (pairs >> 1) ^ (pairs >> 2) ^ (pairs >> 3)
        y = y * (1 - 2 * (odd & 1)).to(tl.float32)
    if SIZE > 1:
        y = _sum_pairs(y, BLOCK_M, BLOCK_C, SIZE)
    if SIZE > 2:
        y = _sum_pairs(y, BLOCK_M, BLOCK_C, SIZE)
    if SIZE > 4:
        y = _sum_pairs(y, BLOCK_M, BLOCK_C, SIZE)
    if SIZE > 8:
        y = _sum_pairs(y, BLOCK_M, BLOCK_C, SIZE)
    if SIZE > 16:
        y = _sum_pairs(y, BLOCK_M, BLOCK_C, SIZE)
    return y
