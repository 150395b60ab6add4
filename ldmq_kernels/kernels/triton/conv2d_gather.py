"""The general implicit-GEMM convolution, which gathers its input by pointers: any geometry, groups and channels.

For what descriptors cannot read, and for GPUs without TMA. The main loop goes over blocks of channels and their taps;
of few channels, over both at once, so that 9 taps of 4 channels are a K of 36 and not of 9 blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.convolution import ConvShape
from ldmq_kernels.kernels.triton.dependent_launch import begin, dependent
from ldmq_kernels.kernels.triton.epilogue import Epilogue
from ldmq_kernels.kernels.triton.launch import EIGHT_BIT, dot_dtype
from ldmq_kernels.kernels.triton.matrix import added_product, store_tile, tile_of_program, unpack_int4
from ldmq_kernels.kernels.triton.tile_tables import Tile

FEW_CHANNELS = 32


@triton.jit
def receptive_field(
    row: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    padding_h: tl.tensor,
    padding_w: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sample, and the input position (h, w) under the first tap, of each output pixel."""
    area = out_height * out_width
    position = row % area
    h = (position // out_width).to(tl.int32) * stride_h - padding_h
    w = (position % out_width).to(tl.int32) * stride_w - padding_w
    return row // area, h, w


@triton.jit
def _load_weight(
    weight_ptr: tl.tensor,
    multiplier_ptr: tl.tensor,
    column: tl.tensor,  # (BLOCK_N,)
    column_mask: tl.tensor,
    tap: tl.tensor,
    block: tl.tensor,
    taps: tl.tensor,
    tap_length: tl.tensor,
    blocks: tl.tensor,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_N, BLOCK_K) of the weight under one tap, as tl.dot takes it."""
    row = column.to(tl.int64)[:, None] * taps + tap
    if multiplier_ptr is not None:
        byte = block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        mask = column_mask[:, None] & (byte < tap_length)[None, :]
        packed = tl.load(weight_ptr + row * tap_length + byte[None, :], mask=mask, other=0)
        multiplier = tl.load(multiplier_ptr + row * blocks + block, mask=column_mask[:, None], other=0)
        weight = unpack_int4(packed) * multiplier.to(tl.int8)
    else:
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = column_mask[:, None] & (k < tap_length)[None, :]
        weight = tl.load(weight_ptr + row * tap_length + k[None, :], mask=mask, other=0.0)
    return weight.to(DOT)


@triton.jit
def _gather_conv2d(
    x_ptr: tl.tensor,  # (N, H, W, C) int8, FP8 or floating
    x_scale_ptr: tl.tensor,  # (1,) or (N,) float32, or None
    weight_ptr: tl.tensor,  # (K, R, S, tap_length) int8 or FP8
    multiplier_ptr: tl.tensor,  # (K, R, S, groups of BLOCK_K) uint8 where the weight holds int4, or None
    weight_scale_ptr: tl.tensor,  # (K,) float32
    bias_ptr: tl.tensor,  # (K,) floating, or None
    sample_bias_ptr: tl.tensor,  # (N, K) floating, or None
    residual_ptr: tl.tensor,  # (N, P, Q, K) floating, or None
    out_ptr: tl.tensor,  # (N, P, Q, K) floating, or (SPLIT_K, N, P, Q, K) of the accumulator
    m: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    channels: tl.tensor,
    out_channels: tl.tensor,
    group_channels: tl.tensor,
    group_out_channels: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    padding_h: tl.tensor,
    padding_w: tl.tensor,
    dilation_h: tl.tensor,
    dilation_w: tl.tensor,
    tap_length: tl.tensor,  # group_channels, or the bytes of as many int4
    R: tl.constexpr,
    S: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    FEW: tl.constexpr,  # the channels of a group where they are few, so that taps and channels are one K, or else 0
    DOT: tl.constexpr,  # the dtype of tl.dot's operands
    EIGHT_BIT: tl.constexpr,  # whether that is int8 or FP8
    ONE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    begin(DEPENDENT)
    group = tl.program_id(2)
    tile_rows, tile_columns = tl.cdiv(m, BLOCK_M), tl.cdiv(group_out_channels, BLOCK_N)
    tile_row, tile_column = tile_of_program(tl.program_id(0), tile_rows, tile_columns)
    row = tile_row.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < m
    first_column = group * group_out_channels + tile_column * BLOCK_N
    last_column = (group + 1) * group_out_channels
    column = first_column + tl.arange(0, BLOCK_N)
    sample, h, w = receptive_field(row, out_height, out_width, stride_h, stride_w, padding_h, padding_w)
    k = R * S * group_channels
    blocks = tl.cdiv(group_channels, BLOCK_K)
    steps = tl.cdiv(k, BLOCK_K) if FEW else R * S * blocks
    split_steps = tl.cdiv(steps, SPLIT_K)
    start = tl.program_id(1) * split_steps
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if tl.int8 == DOT else tl.float32)
    for step in range(start, min(start + split_steps, steps)):
        if FEW:
            index = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = (index // FEW)[None, :]
            h_k, w_k = h[:, None] + tap // S * dilation_h, w[:, None] + tap % S * dilation_w
            channel, mask = (group * group_channels + index % FEW)[None, :], (index < k)[None, :]
            weight = _load_weight(weight_ptr, None, column, column < last_column, 0, step, 1, k, blocks, BLOCK_K, DOT)
        else:
            tap, block = step % (R * S), step // (R * S)
            index = block * BLOCK_K + tl.arange(0, BLOCK_K)
            h_k, w_k = (h + tap // S * dilation_h)[:, None], (w + tap % S * dilation_w)[:, None]
            channel, mask = (group * group_channels + index)[None, :], (index < group_channels)[None, :]
            weight = _load_weight(
                weight_ptr,
                multiplier_ptr,
                column,
                column < last_column,
                tap,
                block,
                R * S,
                tap_length,
                blocks,
                BLOCK_K,
                DOT,
            )
        inside = (h_k >= 0) & (h_k < height * UPSAMPLE) & (w_k >= 0) & (w_k < width * UPSAMPLE)
        pixel = (sample[:, None] * height + h_k // UPSAMPLE) * width + w_k // UPSAMPLE
        x = tl.load(x_ptr + pixel * channels + channel, mask=inside & row_mask[:, None] & mask, other=0.0)
        if EIGHT_BIT:
            accumulator = added_product(x, weight.T, accumulator)
        else:
            accumulator = tl.dot(x.to(DOT), weight.T, accumulator, input_precision="ieee")
    terms = (x_scale_ptr, weight_scale_ptr, bias_ptr, sample_bias_ptr, residual_ptr)
    store_tile(
        accumulator,
        terms,
        out_ptr,
        m,
        out_channels,
        row,
        sample,
        row_mask,
        first_column,
        last_column,
        ONE_SCALE,
        SPLIT_K,
    )


def gather_conv2d(
    conv: ConvShape,
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    multiplier: Tensor | None,
    epilogue: Epilogue,
    out: Tensor,
) -> None:
    """Launch the kernel.

    Args:
        conv: the sizes.
        tile: the tile.
        x: (N, C, H, W) int8, FP8 or floating, channels_last.
        weight: (K, R, S, C / groups) int8 or FP8, or (K, R, S, bytes) int8 holding int4.
        multiplier: (K, R, S, weight groups) uint8, of an int4 weight.
        epilogue: the epilogue's operands, expanded.
        out: (N, K, P, Q) floating, channels_last, or (split_k, N * P * Q, K) of the accumulator.
    """
    grid = (tile.programs(conv.m, conv.group_out_channels), tile.split_k, conv.groups)
    _gather_conv2d[grid](
        x,
        epilogue.x_scale,
        weight,
        multiplier,
        *epilogue.conv2d_terms,
        out,
        *conv.gather_sizes(),
        weight.shape[-1],
        R=conv.kernel_size[0],
        S=conv.kernel_size[1],
        UPSAMPLE=conv.upsample,
        FEW=conv.group_channels if multiplier is None and conv.group_channels < FEW_CHANNELS else 0,
        DOT=dot_dtype(x),
        EIGHT_BIT=x.dtype in EIGHT_BIT,
        ONE_SCALE=epilogue.has_one_scale,
        SPLIT_K=tile.split_k,
        **tile.options(),
        **dependent(x),
    )
