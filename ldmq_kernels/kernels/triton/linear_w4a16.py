"""out = x @ (weight * group_scale)^T + bias.

The GEMM is transposed: weight (n, k) is operand A, unpacked on its way to the tensor cores. A step of the main loop
lies within one group of 64 input channels: its integers become x's dtype exactly, and the group's scale multiplies
the float32 partial sum, so that no weight is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.operands import plain
from ldmq_kernels.kernels.triton.dependent_launch import begin
from ldmq_kernels.kernels.triton.epilogue import Epilogue
from ldmq_kernels.kernels.triton.gemm_launch import LinearLaunch, linear
from ldmq_kernels.kernels.triton.launch import dot_dtype, floating
from ldmq_kernels.kernels.triton.matrix import load_block, store_tile, tile_of_program, unpack_int4
from ldmq_kernels.numerics.formats.int4 import GROUP_SIZE, group_count


@triton.jit
def _linear_w4a16(
    x: tl.tensor,  # (m, k) floating: a descriptor or a pointer
    weight: tl.tensor,  # (n, bytes) int8 holding int4: a descriptor or a pointer
    group_scale_ptr: tl.tensor,  # (n, groups) float32
    bias_ptr: tl.tensor,  # (n,) floating, or None
    out_ptr: tl.tensor,  # (m, n) of x's dtype
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    row_bytes: tl.tensor,
    groups: tl.tensor,
    DOT: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # a multiple of BLOCK_K
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    tile_row, tile_column = tile_of_program(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N))
    first_row, first_column = tile_row * BLOCK_M, tile_column * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first_k in range(0, k, BLOCK_K):
        packed = load_block(weight, first_column, n, first_k // 2, row_bytes, BLOCK_N, BLOCK_K // 2, TILED)
        x_block = load_block(x, first_row, m, first_k, k, BLOCK_M, BLOCK_K, TILED)
        scale = tl.load(group_scale_ptr + column * groups + first_k // GROUP, mask=column < n, other=0.0)
        partial = tl.dot(unpack_int4(packed).to(DOT), x_block.to(DOT).T, input_precision="ieee")
        accumulator += partial * scale[:, None]
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    terms = (None, None, bias_ptr, None, None)
    tile = tl.trans(accumulator)
    store_tile(tile, terms, out_ptr, m, n, row, row, row < m, first_column, n, True, 1)


def linear_w4a16(x: Tensor, weight: Tensor, group_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on int4 weights with a scale for each group, and floating activations.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    k, n = x.shape[-1], group_scale.shape[0]
    row_bytes, groups = -(-k // 2), group_count(k)
    weight = plain(weight, torch.uint8, (n, row_bytes))
    group_scale = plain(group_scale, torch.float32, (n, groups))

    def launch(call: LinearLaunch) -> None:
        _linear_w4a16[call.grid](
            call.x,
            call.weight,
            group_scale,
            call.epilogue.bias,
            call.out,
            *call.sizes,
            row_bytes,
            groups,
            DOT=dot_dtype(x),
            GROUP=GROUP_SIZE,
            **call.options,
        )

    return linear("linear_w4a16", floating(x), weight, Epilogue(None, None, bias), x.dtype, launch)
