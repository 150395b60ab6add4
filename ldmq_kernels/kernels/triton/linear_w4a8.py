"""The int8 linear over int4 weights times their group multipliers, which is an exact int8 weight.

The product is transposed: weight (columns, K) is operand A, so that it goes from its bytes, unpacked and
multiplied in registers, to the tensor cores without a way through shared memory; x is operand B. A step of the
main loop is one group of 64 input channels, and the products of all groups add up in one int32 accumulator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.configurations import Problem, choose, grid
from ldmq_kernels.kernels.triton.launch import (
    Epilogue,
    activation_scale,
    expanded,
    has_tma,
    int8,
    is_aligned,
    on_device,
    operand,
    partial_sums,
    plain,
    stored_dtype,
)
from ldmq_kernels.kernels.triton.matrix import load_block, store_tile, tile_of_program, unpack_int4
from ldmq_kernels.numerics.affine import group_count


@triton.jit
def _linear_w4a8(
    x: tl.tensor,  # (rows, depth) int8: a descriptor or a pointer
    x_scale_ptr: tl.tensor,  # (1,) or (rows,) float32
    weight: tl.tensor,  # (columns, bytes) int8 holding int4: a descriptor or a pointer
    multiplier_ptr: tl.tensor,  # (columns, groups) uint8
    weight_scale_ptr: tl.tensor,  # (columns,) float32
    bias_ptr: tl.tensor,  # (columns,) floating, or None
    residual_ptr: tl.tensor,  # (rows, columns) floating, or None
    out_ptr: tl.tensor,  # (rows, columns) floating, or (SPLITS, rows, columns) int32
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    ONE_SCALE: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # the group size
    SPLITS: tl.constexpr,
) -> None:
    tile_row, tile_column = tile_of_program(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N))
    first_row, first_column = tile_row * BLOCK_M, tile_column * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    split_groups = tl.cdiv(groups, SPLITS)
    start = tl.program_id(1) * split_groups
    stop = min(start + split_groups, groups)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for group in range(start, stop):
        k = group * BLOCK_K
        packed = load_block(weight, first_column, columns, k // 2, row_bytes, BLOCK_N, BLOCK_K // 2, TILED)
        multiplier = tl.load(multiplier_ptr + column * groups + group, mask=column < columns, other=0)
        block = unpack_int4(packed) * multiplier.to(tl.int8)[:, None]
        x_block = load_block(x, first_row, rows, k, depth, BLOCK_M, BLOCK_K, TILED)
        accumulator = tl.dot(block, x_block.T, accumulator, out_dtype=tl.int32)
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    terms = (x_scale_ptr, weight_scale_ptr, bias_ptr, None, residual_ptr)
    tile = tl.trans(accumulator)
    store_tile(tile, terms, out_ptr, rows, columns, row, row, row < rows, first_column, columns, ONE_SCALE, SPLITS)


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
    aligned = is_aligned(x, weight)
    tiled = aligned and has_tma(x.device)
    tile = choose("linear_w4a8" if aligned else "linear_w4a8 unaligned", Problem(rows, columns, depth), x.device)
    target = partial_sums(out, tile, rows, columns)
    epilogue = Epilogue(
        x_scale, weight_scale.contiguous(), expanded(bias, (columns,)), None, expanded(residual, out.shape)
    )
    with on_device(x):
        _linear_w4a8[grid(tile, triton.cdiv(rows, tile.rows), columns, x.device)](
            operand(x, tile.rows, tile.depth, tiled),
            x_scale,
            operand(weight, tile.columns, tile.depth // 2, tiled),
            multiplier,
            epilogue.weight_scale,
            epilogue.bias,
            epilogue.residual,
            target,
            rows,
            columns,
            depth,
            row_bytes,
            groups,
            ONE_SCALE=x_scale.numel() == 1,
            TILED=tiled,
            **tile.options(),
            SPLITS=tile.splits,
        )
        epilogue.finish(target, out, rows, columns, sample_rows=1)
    return out.to(out_dtype)
