"""The int8 convolution over int4 weights times their group multipliers, which is an exact int8 weight.

A step of the main loop is one group of 64 input channels under one tap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.convolution import Convolution, load_tap, receptive_field
from ldmq_kernels.kernels.triton.launch import (
    activation_scale,
    expanded,
    int8,
    int8_tile,
    on_device,
    plain,
    stored_dtype,
)
from ldmq_kernels.kernels.triton.matrix import store_output, tile_of_program, unpack_int4
from ldmq_kernels.numerics.affine import group_count


@triton.jit
def _conv2d_w4a8(
    x_ptr: tl.tensor,  # (N, H, W, C) int8
    x_scale_ptr: tl.tensor,  # (1,) or (N,) float32
    weight_ptr: tl.tensor,  # (K, R, S, tap_bytes) int8 holding int4
    multiplier_ptr: tl.tensor,  # (K, R, S, weight_groups) uint8
    weight_scale_ptr: tl.tensor,  # (K,) float32
    bias_ptr: tl.tensor,  # (K,) floating, or None
    vector_ptr: tl.tensor,  # (N, K) floating, or None
    residual_ptr: tl.tensor,  # (N, P, Q, K) floating, or None
    out_ptr: tl.tensor,  # (N, P, Q, K) floating
    rows: tl.tensor,
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
    tap_bytes: tl.tensor,
    weight_groups: tl.tensor,
    R: tl.constexpr,
    S: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # the group size
) -> None:
    group = tl.program_id(1)
    row, column = tile_of_program(rows, group_out_channels, BLOCK_M, BLOCK_N)
    row_mask, column_mask = row < rows, column < group_out_channels
    column += group * group_out_channels
    sample, h, w = receptive_field(row, out_height, out_width, stride_h, stride_w, padding_h, padding_w)
    first_tap = column.to(tl.int64) * (R * S)
    byte = tl.arange(0, BLOCK_K // 2)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(0, R * S * weight_groups):
        tap = step // weight_groups
        weight_group = step % weight_groups
        k = weight_group * BLOCK_K + tl.arange(0, BLOCK_K)
        tap_h, tap_w = h + (tap // S) * dilation_h, w + (tap % S) * dilation_w
        channel = group * group_channels + k
        k_mask = k < group_channels
        x = load_tap(x_ptr, sample, tap_h, tap_w, row_mask, height, width, UPSAMPLE, channels, channel, k_mask)
        packed_byte = weight_group * (BLOCK_K // 2) + byte
        byte_mask = column_mask[:, None] & (packed_byte < tap_bytes)[None, :]
        packed_ptrs = weight_ptr + (first_tap + tap)[:, None] * tap_bytes + packed_byte[None, :]
        packed = tl.load(packed_ptrs, mask=byte_mask, other=0)
        multiplier_ptrs = multiplier_ptr + (first_tap + tap) * weight_groups + weight_group
        multiplier = tl.load(multiplier_ptrs, mask=column_mask, other=0)
        weight = unpack_int4(packed) * multiplier.to(tl.int8)[:, None]
        accumulator = tl.dot(x, weight.T, accumulator, out_dtype=tl.int32)
    store_output(
        accumulator,
        x_scale_ptr,
        sample,
        weight_scale_ptr,
        bias_ptr,
        vector_ptr,
        sample,
        residual_ptr,
        out_ptr,
        row,
        column,
        row_mask,
        column_mask,
        out_channels,
        ONE_SCALE,
    )


def conv2d_w4a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    sample_vector: Tensor | None,
    residual: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    upsample: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Convolution on int8 activations and two-level int4 weights; arguments as conv2d_w8a8, but for

    Args:
        weight: (K, R, S, ceil(C / groups / 2)) uint8 holding int4.
        multiplier: (K, R, S, weight groups) uint8 in 1..18.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    conv = Convolution.of(x_q, weight_scale.shape[0], kernel_size, stride, padding, dilation, groups, upsample)
    tap_bytes, weight_groups = -(-conv.group_channels // 2), group_count(conv.group_channels)
    taps = (conv.out_channels, *conv.kernel_size)
    weight = plain(weight, torch.uint8, (*taps, tap_bytes)).view(torch.int8)
    multiplier = plain(multiplier, torch.uint8, (*taps, weight_groups))
    x = int8(x_q).contiguous(memory_format=torch.channels_last)
    x_scale = activation_scale(x_scale, conv.samples)
    out = conv.output(x, stored_dtype(x, out_dtype))
    if out.numel() == 0:
        return out.to(out_dtype)
    tile = int8_tile(conv.rows, conv.group_out_channels)
    with on_device(x):
        _conv2d_w4a8[(tile.programs(conv.rows, conv.group_out_channels), groups)](
            x,
            x_scale,
            weight,
            multiplier,
            weight_scale.contiguous(),
            expanded(bias, (conv.out_channels,)),
            expanded(sample_vector, (conv.samples, conv.out_channels)),
            expanded(residual, conv.out_shape),
            out,
            *conv.arguments(),
            tap_bytes,
            weight_groups,
            R=conv.kernel_size[0],
            S=conv.kernel_size[1],
            UPSAMPLE=upsample,
            ONE_SCALE=x_scale.numel() == 1,
            **tile.options(),
        )
    return out.to(out_dtype)
