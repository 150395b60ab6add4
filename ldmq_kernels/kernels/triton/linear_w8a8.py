"""out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual, the GEMM in exact int32.

Of FP8, for `linear_fp8`, the sums are float32.

A tile of the output is BLOCK_M x BLOCK_N; N = 160 is two accumulators, 128 and 32 wide, over one tile of x, which
divides the widths of latent diffusion models (320, 640, 1280) evenly over 132 multiprocessors. Both operands reach
the tensor cores straight from shared memory: x (m, k) and weight (n, k) are K-major.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.operands import plain, quantized
from ldmq_kernels.kernels.triton.dependent_launch import begin
from ldmq_kernels.kernels.triton.epilogue import Epilogue
from ldmq_kernels.kernels.triton.gemm_launch import LinearLaunch, linear
from ldmq_kernels.kernels.triton.launch import EIGHT_BIT_SUMS
from ldmq_kernels.kernels.triton.matrix import added_product, load_block, store_tile, tile_of_program
from ldmq_kernels.kernels.triton.rounding import round_to_int8


@triton.jit
def _quantized(
    x: tl.tensor,
    inv_scale_ptr: tl.tensor,
    first_k: tl.tensor,
    k: tl.tensor,
    BLOCK_K: tl.constexpr,
    ONE_INV_SCALE: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_M, BLOCK_K) floating to int8, as quantize_static does."""
    if ONE_INV_SCALE:
        y = x.to(tl.float32) * tl.load(inv_scale_ptr)
    else:
        channel = first_k + tl.arange(0, BLOCK_K)
        y = x.to(tl.float32) * tl.load(inv_scale_ptr + channel, mask=channel < k, other=0.0)[None, :]
    return round_to_int8(y)


@triton.jit
def _linear_w8a8(
    x: tl.tensor,  # (m, k) int8 or FP8, or floating with an inv_scale: a descriptor or a pointer
    inv_scale_ptr: tl.tensor,  # (1,) or (k,) float32: quantize x on the way in; or None
    x_scale_ptr: tl.tensor,  # (1,) or (m,) float32
    weight: tl.tensor,  # (n, k) int8 or FP8, so K-major for the tensor core: a descriptor or a pointer
    extra_weight: tl.tensor,  # the same with blocks of EXTRA_N rows, or None
    weight_scale_ptr: tl.tensor,  # (n,) float32
    bias_ptr: tl.tensor,  # (n,) floating, or None
    residual_ptr: tl.tensor,  # (m, n) floating, or None
    gate_ptr: tl.tensor,  # (gates, n) floating, or None
    out_ptr: tl.tensor,  # (m, n) floating, or (SPLIT_K, m, n) of the accumulator
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    gate_rows: tl.tensor,
    ONE_INV_SCALE: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,  # int32 of int8, float32 of FP8
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    tile_rows, tile_columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N + EXTRA_N)
    split_length = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    start = tl.program_id(1) * split_length
    stop = min(start + split_length, k)
    for tile in tl.range(tl.program_id(0), tile_rows * tile_columns, tl.num_programs(0), flatten=PERSISTENT):
        tile_row, tile_column = tile_of_program(tile, tile_rows, tile_columns)
        first_row, first_column = tile_row * BLOCK_M, tile_column * (BLOCK_N + EXTRA_N)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
        if EXTRA_N > 0:
            extra = tl.zeros((BLOCK_M, EXTRA_N), ACCUMULATOR)
        for first_k in range(start, stop, BLOCK_K):
            x_block = load_block(x, first_row, m, first_k, k, BLOCK_M, BLOCK_K, TILED)
            if inv_scale_ptr is not None:
                x_block = _quantized(x_block, inv_scale_ptr, first_k, k, BLOCK_K, ONE_INV_SCALE)
            block = load_block(weight, first_column, n, first_k, k, BLOCK_N, BLOCK_K, TILED)
            accumulator = added_product(x_block, block.T, accumulator)
            if EXTRA_N > 0:
                block = load_block(extra_weight, first_column + BLOCK_N, n, first_k, k, EXTRA_N, BLOCK_K, TILED)
                extra = added_product(x_block, block.T, extra)
        row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
        terms = (x_scale_ptr, weight_scale_ptr, bias_ptr, None, residual_ptr)
        store_tile(
            accumulator,
            terms,
            out_ptr,
            m,
            n,
            row,
            row,
            row < m,
            first_column,
            n,
            ONE_SCALE,
            SPLIT_K,
            gate_ptr,
            gate_rows,
        )
        if EXTRA_N > 0:
            beyond = first_column + BLOCK_N
            store_tile(
                extra, terms, out_ptr, m, n, row, row, row < m, beyond, n, ONE_SCALE, SPLIT_K, gate_ptr, gate_rows
            )


def gemm(
    op: str, x: Tensor, inv_scale: Tensor | None, weight: Tensor, epilogue: Epilogue, out_dtype: torch.dtype
) -> Tensor:
    """Launch the kernel on checked operands.

    Args:
        op: the table of tiles.
        x: (..., k) int8 or FP8, or floating with an `inv_scale`.
        inv_scale: (1,) or (k,) float32, contiguous: quantize x in the main loop.
        weight: (n, k) as x, or int8, contiguous.
        epilogue: the epilogue's operands.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        (..., n) of `out_dtype`.

    Raises:
        Unsupported: there are neither one activation scale nor one for each row.
    """

    def launch(call: LinearLaunch) -> None:
        terms = call.epilogue
        _linear_w8a8[call.grid](
            call.x,
            inv_scale,
            terms.x_scale,
            call.weight,
            call.extra_weight,
            terms.weight_scale,
            terms.bias,
            terms.residual,
            terms.gate,
            call.out,
            *call.sizes,
            terms.gate_rows(call.sizes[0]),
            ONE_INV_SCALE=inv_scale is not None and inv_scale.numel() == 1,
            ONE_SCALE=terms.has_one_scale,
            EXTRA_N=call.tile.extra_n,
            SPLIT_K=call.tile.split_k,
            PERSISTENT=call.tile.persistent,
            ACCUMULATOR=EIGHT_BIT_SUMS[weight.dtype],
            **call.options,
        )

    return linear(op, x, weight, epilogue, out_dtype, launch)


def linear_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer on int8 activations and int8 weights.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    weight = plain(weight, torch.int8, (weight_scale.shape[0], x_q.shape[-1]))
    epilogue = Epilogue(x_scale, weight_scale, bias, residual=residual, gate=gate)
    return gemm("linear_w8a8", quantized(x_q, torch.int8), None, weight, epilogue, out_dtype)
