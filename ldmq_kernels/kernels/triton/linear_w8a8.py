"""out = (x_q @ weight^T) * x_scale * weight_scale + bias + residual, the product in exact int32."""

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
from ldmq_kernels.kernels.triton.matrix import store_output, tile_of_program


@triton.jit
def _linear_w8a8(
    x_ptr: tl.tensor,  # (rows, depth) int8
    x_scale_ptr: tl.tensor,  # (1,) or (rows,) float32
    weight_ptr: tl.tensor,  # (columns, depth) int8, so K-major for the tensor core
    weight_scale_ptr: tl.tensor,  # (columns,) float32
    bias_ptr: tl.tensor,  # (columns,) floating, or None
    residual_ptr: tl.tensor,  # (rows, columns) floating, or None
    out_ptr: tl.tensor,  # (rows, columns) floating
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    ONE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row, column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N)
    row_mask, column_mask = row < rows, column < columns
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * depth + k[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[:, None] * depth + k[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, depth, BLOCK_K):
        k_mask = (start + k < depth)[None, :]
        x = tl.load(x_ptrs + start, mask=row_mask[:, None] & k_mask, other=0)
        weight = tl.load(weight_ptrs + start, mask=column_mask[:, None] & k_mask, other=0)
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


def linear_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Linear layer on int8 activations and int8 weights.

    Args:
        x_q: (..., K) int8.
        x_scale: (1,) or (...) float32.
        weight: (N, K) int8.
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
    weight = plain(weight, torch.int8, (columns, depth))
    x = int8(x_q).reshape(-1, depth).contiguous()
    rows = x.shape[0]
    x_scale = activation_scale(x_scale, rows)
    out = torch.empty((*x_q.shape[:-1], columns), dtype=stored_dtype(x, out_dtype), device=x.device)
    if out.numel() == 0:
        return out.to(out_dtype)
    tile = int8_tile(rows, columns)
    with on_device(x):
        _linear_w8a8[(tile.programs(rows, columns),)](
            x,
            x_scale,
            weight,
            weight_scale.contiguous(),
            expanded(bias, (columns,)),
            expanded(residual, out.shape),
            out,
            rows,
            columns,
            depth,
            ONE_SCALE=x_scale.numel() == 1,
            **tile.options(),
        )
    return out.to(out_dtype)
