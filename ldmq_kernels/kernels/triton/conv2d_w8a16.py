"""out = conv(x, weight) * weight_scale + bias: int8 weights become x's dtype in registers, exactly.

The GEMM is transposed: the weight is operand A, converted in registers, and an image tile of x is operand B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.operands import plain
from ldmq_kernels.kernels.triton.convolution import (
    ConvShape,
    image_tile_start,
    load_image_tile,
    pixels_of_tile,
)
from ldmq_kernels.kernels.triton.dependent_launch import begin
from ldmq_kernels.kernels.triton.epilogue import Epilogue
from ldmq_kernels.kernels.triton.gemm_launch import Conv2dLaunch, conv2d
from ldmq_kernels.kernels.triton.launch import dot_dtype, floating
from ldmq_kernels.kernels.triton.matrix import store_tile, tile_of_program


@triton.jit
def _conv2d_w8a16(
    x: tl.tensor,  # descriptor of (N, H, W, C) floating
    weight: tl.tensor,  # descriptor of (K, R * S, C) int8
    weight_scale_ptr: tl.tensor,  # (K,) float32
    bias_ptr: tl.tensor,  # (K,) floating, or None
    out_ptr: tl.tensor,  # (N, P, Q, K) of x's dtype
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
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    BLOCK_S: tl.constexpr = BLOCK_M // (BLOCK_H * BLOCK_W)
    tile_row, tile_column = tile_of_program(tl.program_id(0), image_tiles, tl.cdiv(out_channels, BLOCK_N))
    first_sample, h, w, parity = image_tile_start(tile_row, out_height, out_width, UPSAMPLE, BLOCK_S, BLOCK_H, BLOCK_W)
    first_column = tile_column * BLOCK_N
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(0, TAPS * tl.cdiv(channels, BLOCK_K)):
        tap, c = step % TAPS, step // TAPS * BLOCK_K
        block = tl.reshape(weight.load([first_column, tap, c]), (BLOCK_N, BLOCK_K))
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
        accumulator = tl.dot(block.to(DOT), x_block.to(DOT).T, accumulator, input_precision="ieee")
    row, sample, row_mask = pixels_of_tile(
        first_sample, h, w, parity, samples, out_height, out_width, UPSAMPLE, BLOCK_M, BLOCK_H, BLOCK_W
    )
    terms = (None, weight_scale_ptr, bias_ptr, None, None)
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
        True,
        1,
    )


def conv2d_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    upsample: int,
) -> Tensor:
    """Convolution on int8 weights and floating activations, zero padding.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    conv = ConvShape.of(x, weight_scale.shape[0], kernel_size, stride, padding, dilation, groups, upsample)
    weight = plain(weight, torch.int8, (conv.out_channels, *conv.kernel_size, conv.group_channels))

    def launch(call: Conv2dLaunch) -> None:
        _conv2d_w8a16[call.grid](
            call.x,
            conv.weight_descriptor(weight, call.tile.n, call.tile.k),
            call.epilogue.weight_scale,
            call.epilogue.bias,
            call.out,
            *call.sizes,
            DOT=dot_dtype(x),
            **call.options,
        )

    return conv2d("conv2d_w8a16", conv, floating(x), weight, Epilogue(None, weight_scale, bias), x.dtype, launch)
