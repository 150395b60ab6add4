"""out = (x @ weight^T) * weight_scale + bias: int8 weights become x's dtype in registers, exactly.

The product is transposed: weight (columns, K) is operand A, converted on its way to the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.configurations import Problem, choose, grid
from ldmq_kernels.kernels.triton.launch import (
    dot_dtype,
    expanded,
    float_op,
    floating,
    has_tma,
    is_aligned,
    on_device,
    operand,
    output,
    plain,
)
from ldmq_kernels.kernels.triton.matrix import load_block, store_tile, tile_of_program


@triton.jit
def _linear_w8a16(
    x: tl.tensor,  # (rows, depth) floating: a descriptor or a pointer
    weight: tl.tensor,  # (columns, depth) int8: a descriptor or a pointer
    weight_scale_ptr: tl.tensor,  # (columns,) float32
    bias_ptr: tl.tensor,  # (columns,) floating, or None
    out_ptr: tl.tensor,  # (rows, columns) of x's dtype
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    DOT: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    tile_row, tile_column = tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N))
    first_row, first_column = tile_row * BLOCK_M, tile_column * BLOCK_N
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, depth, BLOCK_K):
        block = load_block(weight, first_column, columns, k, depth, BLOCK_N, BLOCK_K, TILED)
        x_block = load_block(x, first_row, rows, k, depth, BLOCK_M, BLOCK_K, TILED)
        accumulator = tl.dot(block.to(DOT), x_block.to(DOT).T, accumulator, input_precision="ieee")
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    terms = (None, weight_scale_ptr, bias_ptr, None, None)
    tile = tl.trans(accumulator)
    store_tile(tile, terms, out_ptr, rows, columns, row, row, row < rows, first_column, columns, True, 1)


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
    out = output(x, (*x.shape[:-1], columns))
    if out.numel() == 0:
        return out.to(x.dtype)
    tiled = x.dtype != torch.float32 and is_aligned(matrix, weight) and has_tma(x.device)
    tile = choose(float_op("linear_w8a16", x), Problem(rows, columns, depth), x.device)
    with on_device(x):
        _linear_w8a16[grid(tile, triton.cdiv(rows, tile.rows), columns, x.device)](
            operand(matrix, tile.rows, tile.depth, tiled),
            operand(weight, tile.columns, tile.depth, tiled),
            weight_scale.contiguous(),
            expanded(bias, (columns,)),
            out,
            rows,
            columns,
            depth,
            DOT=dot_dtype(x),
            TILED=tiled,
            **tile.options(),
        )
    return out.to(x.dtype)
