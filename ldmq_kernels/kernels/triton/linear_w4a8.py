"""The int8 linear over int4 weights times their group multipliers, which is an exact int8 weight.

The GEMM is transposed: weight (n, k) is operand A, so that it goes from its bytes, unpacked and multiplied in
registers, to the tensor cores without a way through shared memory; x is operand B. A step of the main loop is one
group of 64 input channels, and all groups add up in one int32 accumulator.
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
from ldmq_kernels.kernels.triton.matrix import load_block, store_tile, tile_of_program, unpack_int4
from ldmq_kernels.numerics.formats.int4 import group_count


@triton.jit
def _linear_w4a8(
    x: tl.tensor,  # (m, k) int8: a descriptor or a pointer
    x_scale_ptr: tl.tensor,  # (1,) or (m,) float32
    weight: tl.tensor,  # (n, bytes) int8 holding int4: a descriptor or a pointer
    multiplier_ptr: tl.tensor,  # (n, groups) uint8
    weight_scale_ptr: tl.tensor,  # (n,) float32
    bias_ptr: tl.tensor,  # (n,) floating, or None
    residual_ptr: tl.tensor,  # (m, n) floating, or None
    gate_ptr: tl.tensor,  # (gates, n) floating, or None
    out_ptr: tl.tensor,  # (m, n) floating, or (SPLIT_K, m, n) int32
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    gate_rows: tl.tensor,
    ONE_SCALE: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # the group size
    SPLIT_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    tile_row, tile_column = tile_of_program(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N))
    first_row, first_column = tile_row * BLOCK_M, tile_column * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    split_groups = tl.cdiv(groups, SPLIT_K)
    start = tl.program_id(1) * split_groups
    stop = min(start + split_groups, groups)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for group in range(start, stop):
        first_k = group * BLOCK_K
        packed = load_block(weight, first_column, n, first_k // 2, row_bytes, BLOCK_N, BLOCK_K // 2, TILED)
        multiplier = tl.load(multiplier_ptr + column * groups + group, mask=column < n, other=0)
        block = unpack_int4(packed) * multiplier.to(tl.int8)[:, None]
        x_block = load_block(x, first_row, m, first_k, k, BLOCK_M, BLOCK_K, TILED)
        accumulator = tl.dot(block, x_block.T, accumulator, out_dtype=tl.int32)
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    terms = (x_scale_ptr, weight_scale_ptr, bias_ptr, None, residual_ptr)
    tile = tl.trans(accumulator)
    store_tile(tile, terms, out_ptr, m, n, row, row, row < m, first_column, n, ONE_SCALE, SPLIT_K, gate_ptr, gate_rows)


def linear_w4a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer on int8 activations and two-level int4 weights.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    k, n = x_q.shape[-1], weight_scale.shape[0]
    row_bytes, groups = -(-k // 2), group_count(k)
    weight = plain(weight, torch.uint8, (n, row_bytes))
    multiplier = plain(multiplier, torch.uint8, (n, groups))

    def launch(call: LinearLaunch) -> None:
        terms = call.epilogue
        _linear_w4a8[call.grid](
            call.x,
            terms.x_scale,
            call.weight,
            multiplier,
            terms.weight_scale,
            terms.bias,
            terms.residual,
            terms.gate,
            call.out,
            *call.sizes,
            row_bytes,
            groups,
            terms.gate_rows(call.sizes[0]),
            ONE_SCALE=terms.has_one_scale,
            SPLIT_K=call.tile.split_k,
            **call.options,
        )

    epilogue = Epilogue(x_scale, weight_scale, bias, residual=residual, gate=gate)
    return linear("linear_w4a8", quantized(x_q, torch.int8), weight, epilogue, out_dtype, launch)
