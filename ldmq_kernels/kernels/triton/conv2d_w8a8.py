"""out = conv(x_q, weight) * x_scale * weight_scale + bias + sample_vector + residual, in exact int32."""

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
from ldmq_kernels.kernels.triton.matrix import store_output, tile_of_program


@triton.jit
def _conv2d_w8a8(
    x_ptr: tl.tensor,  # (N, H, W, C) int8
    x_scale_ptr: tl.tensor,  # (1,) or (N,) float32
    weight_ptr: tl.tensor,  # (K, R, S, group_channels) int8
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
    R: tl.constexpr,
    S: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    group = tl.program_id(1)
    row, column = tile_of_program(rows, group_out_channels, BLOCK_M, BLOCK_N)
    row_mask, column_mask = row < rows, column < group_out_channels
    column += group * group_out_channels
    sample, h, w = receptive_field(row, out_height, out_width, stride_h, stride_w, padding_h, padding_w)
    weight_ptrs = weight_ptr + column.to(tl.int64)[:, None] * (R * S * group_channels)
    blocks = tl.cdiv(group_channels, BLOCK_K)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(0, R * S * blocks):
        tap = step // blocks
        k = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        k_mask = k < group_channels
        tap_h, tap_w = h + (tap // S) * dilation_h, w + (tap % S) * dilation_w
        channel = group * group_channels + k
        x = load_tap(x_ptr, sample, tap_h, tap_w, row_mask, height, width, UPSAMPLE, channels, channel, k_mask)
        weight_mask = column_mask[:, None] & k_mask[None, :]
        weight = tl.load(weight_ptrs + (tap * group_channels + k)[None, :], mask=weight_mask, other=0)
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


def conv2d_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
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
    """Convolution on int8 activations and int8 weights, zero padding.

    Args:
        x_q: (N, C, H, W) int8.
        x_scale: (1,) or (N,) float32.
        weight: (K, R, S, C / groups) int8.
        weight_scale: (K,) float32.
        bias: (K,) floating.
        sample_vector: (N, K) floating, added to every position (the time embedding).
        residual: (N, K, P, Q) floating, added last.
        kernel_size: (R, S).
        out_dtype: float16, bfloat16 or float32.
        padding: zeros at (top, bottom, left, right).
        upsample: factor of nearest-neighbour enlargement of the input, 1 or 2.

    Returns:
        (N, K, P, Q) of `out_dtype`, channels_last.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    conv = Convolution.of(x_q, weight_scale.shape[0], kernel_size, stride, padding, dilation, groups, upsample)
    weight = plain(weight, torch.int8, (conv.out_channels, *conv.kernel_size, conv.group_channels))
    x = int8(x_q).contiguous(memory_format=torch.channels_last)
    x_scale = activation_scale(x_scale, conv.samples)
    out = conv.output(x, stored_dtype(x, out_dtype))
    if out.numel() == 0:
        return out.to(out_dtype)
    tile = int8_tile(conv.rows, conv.group_out_channels).shallow(conv.group_channels)
    with on_device(x):
        _conv2d_w8a8[(tile.programs(conv.rows, conv.group_out_channels), groups)](
            x,
            x_scale,
            weight,
            weight_scale.contiguous(),
            expanded(bias, (conv.out_channels,)),
            expanded(sample_vector, (conv.samples, conv.out_channels)),
            expanded(residual, conv.out_shape),
            out,
            *conv.arguments(),
            R=conv.kernel_size[0],
            S=conv.kernel_size[1],
            UPSAMPLE=upsample,
            ONE_SCALE=x_scale.numel() == 1,
            **tile.options(),
        )
    return out.to(out_dtype)
