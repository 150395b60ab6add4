"""out = (x @ weight^T) * weight_scale + bias: int8 weights become x's dtype in registers, exactly.

The GEMM is transposed: weight (n, k) is operand A, converted on its way to the tensor cores.
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
from ldmq_kernels.kernels.triton.matrix import load_block, store_tile, tile_of_program


@triton.jit
def _linear_w8a16(
    x: tl.tensor,  # (m, k) floating: a descriptor or a pointer
    weight: tl.tensor,  # (n, k) int8: a descriptor or a pointer
    weight_scale_ptr: tl.tensor,  # (n,) float32
    bias_ptr: tl.tensor,  # (n,) floating, or None
    out_ptr: tl.tensor,  # (m, n) of x's dtype
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    DOT: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    tile_row, tile_column = tile_of_program(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N))
    first_row, first_column = tile_row * BLOCK_M, tile_column * BLOCK_N
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first_k in range(0, k, BLOCK_K):
        block = load_block(weight, first_column, n, first_k, k, BLOCK_N, BLOCK_K, TILED)
        x_block = load_block(x, first_row, m, first_k, k, BLOCK_M, BLOCK_K, TILED)
        accumulator = tl.dot(block.to(DOT), x_block.to(DOT).T, accumulator, input_precision="ieee")
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    terms = (None, weight_scale_ptr, bias_ptr, None, None)
    tile = tl.trans(accumulator)
    store_tile(tile, terms, out_ptr, m, n, row, row, row < m, first_column, n, True, 1)


def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on int8 weights and floating activations.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    weight = plain(weight, torch.int8, (weight_scale.shape[0], x.shape[-1]))

    def launch(call: LinearLaunch) -> None:
        terms = call.epilogue
        _linear_w8a16[call.grid](
            call.x, call.weight, terms.weight_scale, terms.bias, call.out, *call.sizes, DOT=dot_dtype(x), **call.options
        )

    return linear("linear_w8a16", floating(x), weight, Epilogue(None, weight_scale, bias), x.dtype, launch)
