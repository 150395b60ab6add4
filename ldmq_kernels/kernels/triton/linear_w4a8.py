"""The int8 linear over int4 weights times their group multipliers, which is an exact int8 weight.

A step of the main loop is one group of 64 input channels: its bytes are unpacked and multiplied in int8
in registers, and the products of all groups add up in one int32 accumulator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.launch import (
    activation_scale,
    expanded,
    int8,
    int8_tile,
    on_device,
    plain,
    stored_dtype,
)
from ldmq_kernels.kernels.triton.matrix import store_output, tile_of_program, unpack_int4
from ldmq_kernels.numerics.affine import group_count


@triton.jit
def _linear_w4a8(
    x_ptr: tl.tensor,  # (rows, depth) int8
    x_scale_ptr: tl.tensor,  # (1,) or (rows,) float32
    weight_ptr: tl.tensor,  # (columns, bytes) int8 holding int4
    multiplier_ptr: tl.tensor,  # (columns, groups) uint8
    weight_scale_ptr: tl.tensor,  # (columns,) float32
    bias_ptr: tl.tensor,  # (columns,) floating, or None
    residual_ptr: tl.tensor,  # (rows, columns) floating, or None
    out_ptr: tl.tensor,  # (rows, columns) floating
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    ONE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # the group size
) -> None:
    row, column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N)
    row_mask, column_mask = row < rows, column < columns
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K // 2)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * depth + k[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[:, None] * row_bytes + byte[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for group in range(0, groups):
        start = group * BLOCK_K
        x = tl.load(x_ptrs + start, mask=row_mask[:, None] & (start + k < depth)[None, :], other=0)
        byte_mask = column_mask[:, None] & (start // 2 + byte < row_bytes)[None, :]
        packed = tl.load(weight_ptrs + start // 2, mask=byte_mask, other=0)
        multiplier = tl.load(multiplier_ptr + column * groups + group, mask=column_mask, other=0)
        weight = unpack_int4(packed) * multiplier.to(tl.int8)[:, None]
        accumulator = tl.dot(x, weight.T, accumulator, out_dtype=tl.int32)
    store_output(
        accumulator,
        x_scale_ptr,
        row,
        weight_scale_ptr,
        bias_ptr,
        None,
        row,
        residual_ptr,
        out_ptr,
        row,
        column,
        row_mask,
        column_mask,
        columns,
        ONE_SCALE,
    )


def linear_w4a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Linear layer on int8 activations and two-level int4 weights.

    Args:
        x_q: (..., K) int8.
        x_scale: (1,) or (...) float32.
        weight: (N, ceil(K / 2)) uint8 holding int4.
        multiplier: (N, groups) uint8 in 1..18.
        weight_scale: (N,) float32.
        bias: (N,) floating.
        residual: (..., N) floating, added last.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        (..., N) of `out_dtype`.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    depth, columns = x_q.shape[-1], weight_scale.shape[0]
    row_bytes, groups = -(-depth // 2), group_count(depth)
    weight = plain(weight, torch.uint8, (columns, row_bytes)).view(torch.int8)
    multiplier = plain(multiplier, torch.uint8, (columns, groups))
    x = int8(x_q).reshape(-1, depth).contiguous()
    rows = x.shape[0]
    x_scale = activation_scale(x_scale, rows)
    out = torch.empty((*x_q.shape[:-1], columns), dtype=stored_dtype(x, out_dtype), device=x.device)
    if out.numel() == 0:
        return out.to(out_dtype)
    tile = int8_tile(rows, columns)
    with on_device(x):
        _linear_w4a8[(tile.programs(rows, columns),)](
            x,
            x_scale,
            weight,
            multiplier,
            weight_scale.contiguous(),
            expanded(bias, (columns,)),
            expanded(residual, out.shape),
            out,
            rows,
            columns,
            depth,
            row_bytes,
            groups,
            ONE_SCALE=x_scale.numel() == 1,
            **tile.options(),
        )
    return out.to(out_dtype)
