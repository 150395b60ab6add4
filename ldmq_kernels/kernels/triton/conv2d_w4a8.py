"""The int8 convolution over int4 weights times their group multipliers, which is an exact int8 weight.

The GEMM is transposed: the weight is operand A, unpacked and multiplied in registers, and an image tile of x is
operand B. A step of the main loop is one group of 64 input channels under one tap.
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
from ldmq_kernels.kernels.triton.matrix import store_tile, tile_of_program, unpack_int4
from ldmq_kernels.numerics.formats.int4 import group_count


@triton.jit
def _conv2d_w4a8(
    x: tl.tensor,  # descriptor of (N, H, W, C) int8
    x_scale_ptr: tl.tensor,  # (1,) or (N,) float32
    weight: tl.tensor,  # descriptor of (K, R * S, C / 2) int8 holding int4
    multiplier_ptr: tl.tensor,  # (K, R * S, groups) uint8
    weight_scale_ptr: tl.tensor,  # (K,) float32
    bias_ptr: tl.tensor,  # (K,) floating, or None
    sample_bias_ptr: tl.tensor,  # (N, K) floating, or None
    residual_ptr: tl.tensor,  # (N, P, Q, K) floating, or None
    out_ptr: tl.tensor,  # (N, P, Q, K) floating, or (SPLIT_K, N, P, Q, K) int32
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
    BLOCK_K: tl.constexpr,  # the group size
    SPLIT_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    BLOCK_S: tl.constexpr = BLOCK_M // (BLOCK_H * BLOCK_W)
    tile_row, tile_column = tile_of_program(tl.program_id(0), image_tiles, tl.cdiv(out_channels, BLOCK_N))
    first_sample, h, w, parity = image_tile_start(tile_row, out_height, out_width, UPSAMPLE, BLOCK_S, BLOCK_H, BLOCK_W)
    first_column = tile_column * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    groups = tl.cdiv(channels, BLOCK_K)
    multiplier_ptrs = multiplier_ptr + column.to(tl.int64) * (TAPS * groups)
    split_steps = tl.cdiv(TAPS * groups, SPLIT_K)
    start = tl.program_id(1) * split_steps
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(start, min(start + split_steps, TAPS * groups)):
        tap, group = step % TAPS, step // TAPS
        c = group * BLOCK_K
        packed = tl.reshape(weight.load([first_column, tap, c // 2]), (BLOCK_N, BLOCK_K // 2))
        multiplier = tl.load(multiplier_ptrs + tap * groups + group, mask=column < out_channels, other=0)
        block = unpack_int4(packed) * multiplier.to(tl.int8)[:, None]
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
        accumulator = tl.dot(block, x_block.T, accumulator, out_dtype=tl.int32)
    row, sample, row_mask = pixels_of_tile(
        first_sample, h, w, parity, samples, out_height, out_width, UPSAMPLE, BLOCK_M, BLOCK_H, BLOCK_W
    )
    terms = (x_scale_ptr, weight_scale_ptr, bias_ptr, sample_bias_ptr, residual_ptr)
    m = samples * out_height * out_width
    store_tile(
        tl.trans(accumulator),
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


def conv2d_w4a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    multiplier: Tensor,
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
    """Convolution on int8 activations and two-level int4 weights.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    conv = ConvShape.of(x_q, weight_scale.shape[0], kernel_size, stride, padding, dilation, groups, upsample)
    tap_bytes, weight_groups = -(-conv.group_channels // 2), group_count(conv.group_channels)
    taps = (conv.out_channels, *conv.kernel_size)
    packed = plain(weight, torch.uint8, (*taps, tap_bytes)).view(torch.int8)
    multiplier = plain(multiplier, torch.uint8, (*taps, weight_groups))

    def launch(call: Conv2dLaunch) -> None:
        _conv2d_w4a8[call.grid](
            call.x,
            call.epilogue.x_scale,
            conv.weight_descriptor(packed, call.tile.n, call.tile.k // 2),
            multiplier,
            *call.epilogue.conv2d_terms,
            call.out,
            *call.sizes,
            ONE_SCALE=call.epilogue.has_one_scale,
            SPLIT_K=call.tile.split_k,
            **call.options,
        )

    epilogue = Epilogue(x_scale, weight_scale, bias, sample_bias, residual)
    return conv2d("conv2d_w4a8", conv, quantized(x_q, torch.int8), packed, epilogue, out_dtype, launch, multiplier)
