"""out = conv(x_q, weight) * x_scale * weight_scale + bias + sample_bias + residual, in exact int32.

Of FP8, for `conv2d_fp8`, the sums are float32.

As operand A an image tile of x goes through registers, since it is reshaped; transposed, with the weight as operand A,
both operands reach the tensor cores straight from shared memory. N = 160 is two accumulators, as in linear_w8a8. See
`convolution` for the image tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.operands import plain, quantized
from ldmq_kernels.kernels.triton.convolution import (
    ConvShape,
    image_tile_start,
    load_image_tile,
    pixels_of_tile,
)
from ldmq_kernels.kernels.triton.dependent_launch import begin
from ldmq_kernels.kernels.triton.epilogue import Epilogue
from ldmq_kernels.kernels.triton.gemm_launch import Conv2dLaunch, conv2d
from ldmq_kernels.kernels.triton.launch import EIGHT_BIT_SUMS
from ldmq_kernels.kernels.triton.matrix import added_product, store_tile, tile_of_program


@triton.jit
def _conv2d_w8a8(
    x: tl.tensor,  # descriptor of (N, H, W, C) int8 or FP8
    x_scale_ptr: tl.tensor,  # (1,) or (N,) float32
    weight: tl.tensor,  # descriptor of (K, R * S, C) int8 or FP8, or of (K, R * S * C) if TRANSPOSED
    extra_weight: tl.tensor,  # the same with blocks of EXTRA_N rows, or None
    weight_scale_ptr: tl.tensor,  # (K,) float32
    bias_ptr: tl.tensor,  # (K,) floating, or None
    sample_bias_ptr: tl.tensor,  # (N, K) floating, or None
    residual_ptr: tl.tensor,  # (N, P, Q, K) floating, or None
    out_ptr: tl.tensor,  # (N, P, Q, K) floating, or (SPLIT_K, N, P, Q, K) of the accumulator
    image_tiles: tl.tensor,
    samples: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    channels: tl.tensor,
    out_channels: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    S: tl.constexpr,
    TAPS: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,  # int32 of int8, float32 of FP8
    TRANSPOSED: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    BLOCK_S: tl.constexpr = BLOCK_M // (BLOCK_H * BLOCK_W)
    tile_columns = tl.cdiv(out_channels, BLOCK_N + EXTRA_N)
    steps = TAPS * tl.cdiv(channels, BLOCK_K)
    start, stop = 0, steps
    if SPLIT_K > 1:
        split_steps = tl.cdiv(steps, SPLIT_K)
        start = tl.program_id(1) * split_steps
        stop = min(start + split_steps, steps)
    first = tl.program_id(0)
    # one tile where that is all: else the compiler keeps what all tiles share in registers, beside the accumulators
    end = image_tiles * tile_columns if PERSISTENT else first + 1
    for tile in tl.range(first, end, tl.num_programs(0) if PERSISTENT else 1, flatten=PERSISTENT):
        tile_row, tile_column = tile_of_program(tile, image_tiles, tile_columns)
        first_sample, h, w, parity = image_tile_start(
            tile_row, out_height, out_width, UPSAMPLE, BLOCK_S, BLOCK_H, BLOCK_W
        )
        first_column = tile_column * (BLOCK_N + EXTRA_N)
        accumulator = tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N), ACCUMULATOR)
        if EXTRA_N > 0:
            extra = tl.zeros((BLOCK_M, EXTRA_N), ACCUMULATOR)
        for step in range(start, stop):
            tap, c = step % TAPS, step // TAPS * BLOCK_K
            x_block = load_image_tile(
                x,
                first_sample,
                h,
                w,
                parity,
                tap,
                c,
                channels,
                top,
                left,
                S,
                DILATION_H,
                DILATION_W,
                STRIDE,
                UPSAMPLE,
                BLOCK_M,
                BLOCK_K,
            )
            if TRANSPOSED:
                block = weight.load([first_column, tap * channels + c])
                accumulator = added_product(block, x_block.T, accumulator)
            else:
                block = tl.reshape(weight.load([first_column, tap, c]), (BLOCK_N, BLOCK_K))
                accumulator = added_product(x_block, block.T, accumulator)
            if EXTRA_N > 0:
                block = tl.reshape(extra_weight.load([first_column + BLOCK_N, tap, c]), (EXTRA_N, BLOCK_K))
                extra = added_product(x_block, block.T, extra)
        row, sample, row_mask = pixels_of_tile(
            first_sample, h, w, parity, samples, out_height, out_width, UPSAMPLE, BLOCK_M, BLOCK_H, BLOCK_W
        )
        terms = (x_scale_ptr, weight_scale_ptr, bias_ptr, sample_bias_ptr, residual_ptr)
        m = samples * out_height * out_width
        store_tile(
            tl.trans(accumulator) if TRANSPOSED else accumulator,
            terms,
            out_ptr,
            m,
            out_channels,
            row,
            sample,
            row_mask,
            first_column,
            out_channels,
            ONE_SCALE,
            SPLIT_K,
        )
        if EXTRA_N > 0:
            store_tile(
                extra,
                terms,
                out_ptr,
                m,
                out_channels,
                row,
                sample,
                row_mask,
                first_column + BLOCK_N,
                out_channels,
                ONE_SCALE,
                SPLIT_K,
            )


def conv2d_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    sample_bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    upsample: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Convolution on int8 activations and int8 weights, zero padding.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    conv = ConvShape.of(x_q, weight_scale.shape[0], kernel_size, stride, padding, dilation, groups, upsample)
    epilogue = Epilogue(x_scale, weight_scale, bias, sample_bias, residual)
    return convolve("conv2d_w8a8", torch.int8, conv, x_q, weight, epilogue, out_dtype)


def convolve(
    op: str,
    dtype: torch.dtype,
    conv: ConvShape,
    x_q: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch the kernel, or the one that gathers, on operands of an 8-bit dtype.

    Args:
        op: the table of tiles.
        dtype: int8 or FP8.
        conv: the sizes.
        x_q: (N, C, H, W) of `dtype`.
        weight: (K, R, S, C / groups) of `dtype`.
        epilogue: the epilogue's operands, as the op was given them.
        out_dtype: float16, bfloat16 or float32.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    weight = plain(weight, dtype, (conv.out_channels, *conv.kernel_size, conv.group_channels))

    def launch(call: Conv2dLaunch) -> None:
        tile = call.tile
        flat = conv.flat_weight_descriptor(weight, tile.n, tile.k) if tile.transposed else None
        _conv2d_w8a8[call.grid](
            call.x,
            call.epilogue.x_scale,
            flat or conv.weight_descriptor(weight, tile.main_n, tile.k),
            conv.weight_descriptor(weight, tile.extra_n, tile.k) if tile.extra_n else None,
            *call.epilogue.conv2d_terms,
            call.out,
            *call.sizes,
            ONE_SCALE=call.epilogue.has_one_scale,
            EXTRA_N=tile.extra_n,
            SPLIT_K=tile.split_k,
            PERSISTENT=tile.persistent,
            ACCUMULATOR=EIGHT_BIT_SUMS[weight.dtype],
            TRANSPOSED=flat is not None,
            **call.options,
        )

    return conv2d(op, conv, quantized(x_q, dtype), weight, epilogue, out_dtype, launch)
