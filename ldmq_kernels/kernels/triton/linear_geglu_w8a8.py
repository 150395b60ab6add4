"""out = value * gelu(gate), [value | gate] = (x_q @ weight^T) * x_scale * weight_scale + bias, the GEMM in exact int32.

Of FP8, for `linear_geglu_fp8`, the sums are float32.

A tile has BLOCK_N / 2 values and, beside them, their gates: one descriptor of the weight as (2, n, k) brings the rows
of both halves, which lie in shared memory as one operand. Two halves of an accumulator's columns are in the same
threads, so that the epilogue moves nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.operands import check_gated_output, plain, quantized
from ldmq_kernels.kernels.triton.dependent_launch import begin
from ldmq_kernels.kernels.triton.epilogue import Epilogue
from ldmq_kernels.kernels.triton.gemm_launch import LinearLaunch, linear
from ldmq_kernels.kernels.triton.launch import EIGHT_BIT_SUMS, quantized_dtype
from ldmq_kernels.kernels.triton.matrix import added_product, halves, load_block, tile_of_program
from ldmq_kernels.kernels.triton.producers import gelu
from ldmq_kernels.kernels.triton.rounding import rounded_to

STORED_COLUMNS = tl.constexpr(32)  # of the output, in one slice of a tile's epilogue


@triton.jit
def _load_halves(
    weight: tl.tensor,  # a descriptor of (2, n, k) with blocks of (2, BLOCK_N / 2, BLOCK_K), or a pointer to its start
    first_column: tl.tensor,
    n: tl.tensor,
    first_k: tl.tensor,
    k: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILED: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_N, BLOCK_K): rows of the values, then those of their gates; zero outside of the matrix."""
    if TILED:
        block = tl.reshape(weight.load([0, first_column, first_k]), (BLOCK_N, BLOCK_K))
    else:
        row, column = tl.arange(0, BLOCK_N), first_k + tl.arange(0, BLOCK_K)
        in_half = first_column + row % (BLOCK_N // 2)
        source = (row // (BLOCK_N // 2)).to(tl.int64) * n + in_half
        pointers = weight + source[:, None] * k + column[None, :]
        block = tl.load(pointers, mask=(in_half < n)[:, None] & (column < k)[None, :], other=0.0)
    return block


@triton.jit
def _scaled(
    accumulator: tl.tensor,
    x_scale: tl.tensor,
    weight_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """accumulator * x_scale * weight_scale + bias, of columns of the product."""
    out = accumulator.to(tl.float32) * x_scale
    out = out * tl.load(weight_scale_ptr + column, mask=mask, other=0.0)[None, :]
    if bias_ptr is not None:
        out = out + tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def _store_gated(
    value: tl.tensor,
    gate: tl.tensor,
    terms: tl.tuple,  # x_scale (one or (BLOCK_M, 1)), and pointers as `_linear_geglu` has them
    out_ptr: tl.tensor,
    n: tl.tensor,
    row: tl.tensor,  # (BLOCK_M,) int64
    row_mask: tl.tensor,
    first_column: tl.tensor,
    ONE_INV_SCALE: tl.constexpr,
) -> None:
    """Gate a tile's values and store them, slice by slice: few registers are left for it."""
    if value.shape[1] > STORED_COLUMNS:
        left_value, right_value = halves(value)
        left_gate, right_gate = halves(gate)
        second = first_column + right_value.shape[1]
        _store_gated(left_value, left_gate, terms, out_ptr, n, row, row_mask, first_column, ONE_INV_SCALE)
        _store_gated(right_value, right_gate, terms, out_ptr, n, row, row_mask, second, ONE_INV_SCALE)
    else:
        x_scale, weight_scale_ptr, bias_ptr, out_inv_scale_ptr = terms
        column = first_column + tl.arange(0, value.shape[1])
        mask = column < n
        values = _scaled(value, x_scale, weight_scale_ptr, bias_ptr, column, mask)
        out = values * gelu(_scaled(gate, x_scale, weight_scale_ptr, bias_ptr, n + column, mask))
        if out_inv_scale_ptr is not None:
            if ONE_INV_SCALE:
                out = out * tl.load(out_inv_scale_ptr)
            else:
                out = out * tl.load(out_inv_scale_ptr + column, mask=mask, other=0.0)[None, :]
            out = rounded_to(out, out_ptr.dtype.element_ty)
        pointers = out_ptr + row[:, None] * n + column[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & mask[None, :])


@triton.jit
def _linear_geglu(
    x: tl.tensor,  # (m, k) int8 or FP8: a descriptor or a pointer
    x_scale_ptr: tl.tensor,  # (1,) or (m,) float32
    weight: tl.tensor,  # (2, n, k) of the same, so K-major for the tensor core: a descriptor or a pointer
    weight_scale_ptr: tl.tensor,  # (2 n,) float32
    bias_ptr: tl.tensor,  # (2 n,) floating, or None
    out_inv_scale_ptr: tl.tensor,  # (1,) or (n,) float32, or None
    out_ptr: tl.tensor,  # (m, n) floating, int8 or FP8
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    ONE_INV_SCALE: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACCUMULATOR: tl.constexpr,  # int32 of int8, float32 of FP8
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    tile_rows, tile_columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N // 2)
    tile_row, tile_column = tile_of_program(tl.program_id(0), tile_rows, tile_columns)
    first_row, first_column = tile_row * BLOCK_M, tile_column * (BLOCK_N // 2)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for first_k in range(0, k, BLOCK_K):
        x_block = load_block(x, first_row, m, first_k, k, BLOCK_M, BLOCK_K, TILED)
        block = _load_halves(weight, first_column, n, first_k, k, BLOCK_N, BLOCK_K, TILED)
        accumulator = added_product(x_block, block.T, accumulator)
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    if ONE_SCALE:
        x_scale = tl.load(x_scale_ptr)
    else:
        x_scale = tl.load(x_scale_ptr + row, mask=row < m, other=0.0)[:, None]
    value, gate = halves(accumulator)
    terms = (x_scale, weight_scale_ptr, bias_ptr, out_inv_scale_ptr)
    _store_gated(value, gate, terms, out_ptr, n, row, row < m, first_column, ONE_INV_SCALE)


def geglu(
    op: str,
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch the kernel on operands whose dtypes are checked.

    Args:
        op: the table of tiles.
        x_q, x_scale, weight, weight_scale, bias, out_inv_scale, out_dtype: as the op has them.

    Returns:
        (..., n) of `out_dtype`.

    Raises:
        Unsupported: an operand of another size, an output that does not fit `out_inv_scale`, or FP8 on a GPU without.
    """
    check_gated_output(out_inv_scale, out_dtype, weight_scale.shape[0] // 2)
    if out_inv_scale is not None:
        out_inv_scale = out_inv_scale.contiguous()
        quantized_dtype(x_q, out_dtype)

    def launch(call: LinearLaunch) -> None:
        terms = call.epilogue
        _linear_geglu[call.grid](
            call.x,
            terms.x_scale,
            call.weight,
            terms.weight_scale,
            terms.bias,
            out_inv_scale,
            call.out,
            *call.sizes,
            ONE_INV_SCALE=out_inv_scale is not None and out_inv_scale.numel() == 1,
            ONE_SCALE=terms.has_one_scale,
            ACCUMULATOR=EIGHT_BIT_SUMS[weight.dtype],
            **call.options,
        )

    return linear(op, x_q, weight, Epilogue(x_scale, weight_scale, bias), out_dtype, launch, has_gates=True)


def linear_geglu_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """GEGLU layer on int8 activations and int8 weights.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    weight = plain(weight, torch.int8, (weight_scale.shape[0], x_q.shape[-1]))
    x_q = quantized(x_q, torch.int8)
    return geglu("linear_geglu_w8a8", x_q, x_scale, weight, weight_scale, bias, out_inv_scale, out_dtype)
