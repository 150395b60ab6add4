"""out = x @ (weight * group_scale)^T + bias.

The product is transposed: weight (columns, K) is operand A, unpacked on its way to the tensor cores. A step of
the main loop lies within one group of 64 input channels: its integers become x's dtype exactly, and the group's
scale multiplies the float32 product, so that no weight is rounded.
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
from ldmq_kernels.kernels.triton.matrix import load_block, store_tile, tile_of_program, unpack_int4
from ldmq_kernels.numerics.affine import group_count
from ldmq_kernels.numerics.formats import GROUP_SIZE


@triton.jit
def _linear_w4a16(
    x: tl.tensor,  # (rows, depth) floating: a descriptor or a pointer
    weight: tl.tensor,  # (columns, bytes) int8 holding int4: a descriptor or a pointer
    group_scale_ptr: tl.tensor,  # (columns, groups) float32
    bias_ptr: tl.tensor,  # (columns,) floating, or None
    out_ptr: tl.tensor,  # (rows, columns) of x's dtype
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    DOT: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # a multiple of BLOCK_K
) -> None:
    tile_row, tile_column = tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N))
    first_row, first_column = tile_row * BLOCK_M, tile_column * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, depth, BLOCK_K):
        packed = load_block(weight, first_column, columns, k // 2, row_bytes, BLOCK_N, BLOCK_K // 2, TILED)
        x_block = load_block(x, first_row, rows, k, depth, BLOCK_M, BLOCK_K, TILED)
        scale = tl.load(group_scale_ptr + column * groups + k // GROUP, mask=column < columns, other=0.0)
        product = tl.dot(unpack_int4(packed).to(DOT), x_block.to(DOT).T, input_precision="ieee")
        accumulator += product * scale[:, None]
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    terms = (None, None, bias_ptr, None, None)
    tile = tl.trans(accumulator)
    store_tile(tile, terms, out_ptr, rows, columns, row, row, row < rows, first_column, columns, True, 1)


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
    out = output(x, (*x.shape[:-1], columns))
    if out.numel() == 0:
        return out.to(x.dtype)
    tiled = x.dtype != torch.float32 and is_aligned(matrix, weight) and has_tma(x.device)
    tile = choose(float_op("linear_w4a16", x), Problem(rows, columns, depth), x.device)
    with on_device(x):
        _linear_w4a16[grid(tile, triton.cdiv(rows, tile.rows), columns, x.device)](
            operand(matrix, tile.rows, tile.depth, tiled),
            operand(weight, tile.columns, tile.depth // 2, tiled),
            group_scale,
            expanded(bias, (columns,)),
            out,
            rows,
            columns,
            depth,
            row_bytes,
            groups,
            DOT=dot_dtype(x),
            TILED=tiled,
            GROUP=GROUP_SIZE,
            **tile.options(),
        )
    return out.to(x.dtype)
