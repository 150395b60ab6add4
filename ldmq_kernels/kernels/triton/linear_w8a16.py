"""out = (x @ weight^T) * weight_scale + bias: int8 weights become x's dtype in registers, exactly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.launch import dot_dtype, expanded, float_tile, floating, on_device, plain, stored_dtype
from ldmq_kernels.kernels.triton.matrix import store_output, tile_of_program


@triton.jit
def _linear_w8a16(
    x_ptr: tl.tensor,  # (rows, depth) floating
    weight_ptr: tl.tensor,  # (columns, depth) int8
    weight_scale_ptr: tl.tensor,  # (columns,) float32
    bias_ptr: tl.tensor,  # (columns,) floating, or None
    out_ptr: tl.tensor,  # (rows, columns) of x's dtype
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row, column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N)
    row_mask, column_mask = row < rows, column < columns
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * depth + k[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[:, None] * depth + k[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k_mask = (start + k < depth)[None, :]
        x = tl.load(x_ptrs + start, mask=row_mask[:, None] & k_mask, other=0.0)
        weight = tl.load(weight_ptrs + start, mask=column_mask[:, None] & k_mask, other=0)
        accumulator = tl.dot(x.to(DOT), weight.to(DOT).T, accumulator, input_precision="ieee")
    store_output(
        accumulator,
        None,
        row,
        weight_scale_ptr,
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


def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on int8 weights and floating activations.

    Args:
        x: (..., K) floating.
        weight: (N, K) int8.
        weight_scale: (N,) float32.
        bias: (N,) floating.

    Returns:
        (..., N) of x's dtype.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    depth, columns = x.shape[-1], weight_scale.shape[0]
    weight = plain(weight, torch.int8, (columns, depth))
    matrix = floating(x).reshape(-1, depth).contiguous()
    rows = matrix.shape[0]
    out = torch.empty((*x.shape[:-1], columns), dtype=stored_dtype(x, x.dtype), device=x.device)
    if out.numel() == 0:
        return out.to(x.dtype)
    tile = float_tile(rows, columns, x.dtype)
    with on_device(x):
        _linear_w8a16[(tile.programs(rows, columns),)](
            matrix,
            weight,
            weight_scale.contiguous(),
            expanded(bias, (columns,)),
            out,
            rows,
            columns,
            depth,
            DOT=dot_dtype(x),
            **tile.options(),
        )
    return out.to(x.dtype)
