"""out = (x_q @ weight^T) * x_scale * weight_scale + bias + residual, the product in exact int32.

A tile of the output is rows x columns; 160 columns are two accumulators, 128 and 32 wide, over one tile of x,
which divides the widths of latent diffusion models (320, 640, 1280) evenly over 132 multiprocessors. Both
operands reach the tensor cores straight from shared memory: x (rows, K) and weight (columns, K) are K-major.
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
from ldmq_kernels.kernels.triton.matrix import load_block, store_tile, tile_of_program
from ldmq_kernels.kernels.triton.rounding import round_to_int8


@triton.jit
def _quantized(
    x: tl.tensor,
    inv_scale_ptr: tl.tensor,
    first: tl.tensor,
    depth: tl.tensor,
    BLOCK_K: tl.constexpr,
    ONE_INV_SCALE: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_M, BLOCK_K) floating to int8, as quantize_static does."""
    if ONE_INV_SCALE:
        y = x.to(tl.float32) * tl.load(inv_scale_ptr)
    else:
        k = first + tl.arange(0, BLOCK_K)
        y = x.to(tl.float32) * tl.load(inv_scale_ptr + k, mask=k < depth, other=0.0)[None, :]
    return round_to_int8(y)


@triton.jit
def _linear_w8a8(
    x: tl.tensor,  # (rows, depth) int8, or floating with a reciprocal: a descriptor or a pointer
    inv_scale_ptr: tl.tensor,  # (1,) or (depth,) float32: quantize x on the way in; or None
    x_scale_ptr: tl.tensor,  # (1,) or (rows,) float32
    weight: tl.tensor,  # (columns, depth) int8, so K-major for the tensor core: a descriptor or a pointer
    extra_weight: tl.tensor,  # the same with blocks of EXTRA_N rows, or None
    weight_scale_ptr: tl.tensor,  # (columns,) float32
    bias_ptr: tl.tensor,  # (columns,) floating, or None
    residual_ptr: tl.tensor,  # (rows, columns) floating, or None
    out_ptr: tl.tensor,  # (rows, columns) floating, or (SPLITS, rows, columns) int32
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    ONE_INV_SCALE: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PERSISTENT: tl.constexpr,
) -> None:
    tile_rows, tile_columns = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N + EXTRA_N)
    split_depth = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLITS) * BLOCK_K
    start = tl.program_id(1) * split_depth
    stop = min(start + split_depth, depth)
    for tile in tl.range(tl.program_id(0), tile_rows * tile_columns, tl.num_programs(0), flatten=PERSISTENT):
        tile_row, tile_column = tile_of_program(tile, tile_rows, tile_columns)
        first_row, first_column = tile_row * BLOCK_M, tile_column * (BLOCK_N + EXTRA_N)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        if EXTRA_N > 0:
            extra = tl.zeros((BLOCK_M, EXTRA_N), tl.int32)
        for k in range(start, stop, BLOCK_K):
            x_block = load_block(x, first_row, rows, k, depth, BLOCK_M, BLOCK_K, TILED)
            if inv_scale_ptr is not None:
                x_block = _quantized(x_block, inv_scale_ptr, k, depth, BLOCK_K, ONE_INV_SCALE)
            block = load_block(weight, first_column, columns, k, depth, BLOCK_N, BLOCK_K, TILED)
            accumulator = tl.dot(x_block, block.T, accumulator, out_dtype=tl.int32)
            if EXTRA_N > 0:
                block = load_block(extra_weight, first_column + BLOCK_N, columns, k, depth, EXTRA_N, BLOCK_K, TILED)
                extra = tl.dot(x_block, block.T, extra, out_dtype=tl.int32)
        row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
        terms = (x_scale_ptr, weight_scale_ptr, bias_ptr, None, residual_ptr)
        store_tile(
            accumulator, terms, out_ptr, rows, columns, row, row, row < rows, first_column, columns, ONE_SCALE, SPLITS
        )
        if EXTRA_N > 0:
            beyond = first_column + BLOCK_N
            store_tile(extra, terms, out_ptr, rows, columns, row, row, row < rows, beyond, columns, ONE_SCALE, SPLITS)


def product(
    op: str,
    x: Tensor,
    inv_scale: Tensor | None,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The kernel's launch with operands that are checked: x (..., K) int8, or floating with a `inv_scale`."""
    columns, depth = weight.shape
    matrix = x.reshape(-1, depth).contiguous()
    rows = matrix.shape[0]
    x_scale = activation_scale(x_scale, rows)
    out = torch.empty((*x.shape[:-1], columns), dtype=stored_dtype(x, out_dtype), device=x.device)
    if out.numel() == 0:
        return out.to(out_dtype)
    aligned = is_aligned(matrix, weight)
    tiled = aligned and has_tma(x.device)
    tile = choose(op if aligned else f"{op} unaligned", Problem(rows, columns, depth), x.device)
    target = partial_sums(out, tile, rows, columns)
    epilogue = Epilogue(
        x_scale, weight_scale.contiguous(), expanded(bias, (columns,)), None, expanded(residual, out.shape)
    )
    with on_device(x):
        _linear_w8a8[grid(tile, triton.cdiv(rows, tile.rows), columns, x.device)](
            operand(matrix, tile.rows, tile.depth, tiled),
            inv_scale,
            x_scale,
            operand(weight, tile.main_columns, tile.depth, tiled),
            operand(weight, tile.extra_columns, tile.depth, tiled),
            epilogue.weight_scale,
            epilogue.bias,
            epilogue.residual,
            target,
            rows,
            columns,
            depth,
            ONE_INV_SCALE=inv_scale is not None and inv_scale.numel() == 1,
            ONE_SCALE=x_scale.numel() == 1,
            TILED=tiled,
            **tile.options_with_extra(),
            SPLITS=tile.splits,
            PERSISTENT=tile.persistent,
        )
        epilogue.finish(target, out, rows, columns, sample_rows=1)
    return out.to(out_dtype)


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
    weight = plain(weight, torch.int8, (weight_scale.shape[0], x_q.shape[-1]))
    return product("linear_w8a8", int8(x_q), None, x_scale, weight, weight_scale, bias, residual, out_dtype)
