"""out = x @ (weight * group_scale)^T + bias.

A step of the main loop lies within one group of 64 input channels: its integers become x's dtype exactly,
and the group's scale multiplies the float32 product, so that no weight is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.launch import dot_dtype, expanded, float_tile, floating, on_device, plain, stored_dtype
from ldmq_kernels.kernels.triton.matrix import store_output, tile_of_program, unpack_int4
from ldmq_kernels.numerics.affine import group_count
from ldmq_kernels.numerics.formats import GROUP_SIZE


@triton.jit
def _linear_w4a16(
    x_ptr: tl.tensor,  # (rows, depth) floating
    weight_ptr: tl.tensor,  # (columns, bytes) int8 holding int4
    group_scale_ptr: tl.tensor,  # (columns, groups) float32
    bias_ptr: tl.tensor,  # (columns,) floating, or None
    out_ptr: tl.tensor,  # (rows, columns) of x's dtype
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # a multiple of BLOCK_K
) -> None:
    row, column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N)
    row_mask, column_mask = row < rows, column < columns
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K // 2)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * depth + k[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[:, None] * row_bytes + byte[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        x = tl.load(x_ptrs + start, mask=row_mask[:, None] & (start + k < depth)[None, :], other=0.0)
        byte_mask = column_mask[:, None] & (start // 2 + byte < row_bytes)[None, :]
        weight = unpack_int4(tl.load(weight_ptrs + start // 2, mask=byte_mask, other=0))
        scale = tl.load(group_scale_ptr + column * groups + start // GROUP, mask=column_mask, other=0.0)
        accumulator += tl.dot(x.to(DOT), weight.to(DOT).T, input_precision="ieee") * scale[None, :]
    store_output(
        accumulator,
        None,
        row,
        None,
        bias_ptr,
        None,
        row,
        None,
        out_ptr,
        row,
        column,
        row_mask,
        column_mask,
        columns,
        True,
    )


def linear_w4a16(x: Tensor, weight: Tensor, group_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on int4 weights with a scale for each group, and floating activations.

    Args:
        x: (..., K) floating.
        weight: (N, ceil(K / 2)) uint8 holding int4.
        group_scale: (N, groups) float32.
        bias: (N,) floating.

    Returns:
        (..., N) of x's dtype.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    depth, columns = x.shape[-1], group_scale.shape[0]
    row_bytes, groups = -(-depth // 2), group_count(depth)
    weight = plain(weight, torch.uint8, (columns, row_bytes)).view(torch.int8)
    group_scale = plain(group_scale, torch.float32, (columns, groups))
    matrix = floating(x).reshape(-1, depth).contiguous()
    rows = matrix.shape[0]
    out = torch.empty((*x.shape[:-1], columns), dtype=stored_dtype(x, x.dtype), device=x.device)
    if out.numel() == 0:
        return out.to(x.dtype)
    tile = float_tile(rows, columns, x.dtype).narrowed(64)
    with on_device(x):
        _linear_w4a16[(tile.programs(rows, columns),)](
            matrix,
            weight,
            group_scale,
            expanded(bias, (columns,)),
            out,
            rows,
            columns,
            depth,
            row_bytes,
            groups,
            DOT=dot_dtype(x),
            GROUP=GROUP_SIZE,
            **tile.options(),
        )
    return out.to(x.dtype)
