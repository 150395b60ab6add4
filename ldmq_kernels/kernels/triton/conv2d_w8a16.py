"""out = conv(x, weight) * weight_scale + bias: int8 weights become x's dtype in registers, exactly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.convolution import Convolution, load_tap, receptive_field
from ldmq_kernels.kernels.triton.launch import dot_dtype, expanded, float_tile, floating, on_device, plain, stored_dtype
from ldmq_kernels.kernels.triton.matrix import store_output, tile_of_program


@triton.jit
def _conv2d_w8a16(
    x_ptr: tl.tensor,  # (N, H, W, C) floating
    weight_ptr: tl.tensor,  # (K, R, S, group_channels) int8
    weight_scale_ptr: tl.tensor,  # (K,) float32
    bias_ptr: tl.tensor,  # (K,) floating, or None
    out_ptr: tl.tensor,  # (N, P, Q, K) of x's dtype
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
    DOT: tl.constexpr,
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
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, R * S * blocks):
        tap = step // blocks
        k = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        k_mask = k < group_channels
        tap_h, tap_w = h + (tap // S) * dilation_h, w + (tap % S) * dilation_w
        channel = group * group_channels + k
        x = load_tap(x_ptr, sample, tap_h, tap_w, row_mask, height, width, UPSAMPLE, channels, channel, k_mask)
        weight_mask = column_mask[:, None] & k_mask[None, :]
        weight = tl.load(weight_ptrs + (tap * group_channels + k)[None, :], mask=weight_mask, other=0)
        accumulator = tl.dot(x.to(DOT), weight.to(DOT).T, accumulator, input_precision="ieee")
    store_output(
        accumulator,
        None,
        sample,
        weight_scale_ptr,
        bias_ptr,
        None,
        sample,
        None,
        out_ptr,
        row,
        column,
        row_mask,
        column_mask,
        out_channels,
        True,
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

    Args:
        x: (N, C, H, W) floating.
        weight: (K, R, S, C / groups) int8.
        weight_scale: (K,) float32.
        bias: (K,) floating.
        padding: zeros at (top, bottom, left, right).
        upsample: factor of nearest-neighbour enlargement of the input, 1 or 2.

    Returns:
        (N, K, P, Q) of x's dtype, channels_last.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    conv = Convolution.of(x, weight_scale.shape[0], kernel_size, stride, padding, dilation, groups, upsample)
    weight = plain(weight, torch.int8, (conv.out_channels, *conv.kernel_size, conv.group_channels))
    x = floating(x).contiguous(memory_format=torch.channels_last)
    out = conv.output(x, stored_dtype(x, x.dtype))
    if out.numel() == 0:
        return out.to(x.dtype)
    tile = float_tile(conv.rows, conv.group_out_channels, x.dtype).shallow(conv.group_channels)
    with on_device(x):
        _conv2d_w8a16[(tile.programs(conv.rows, conv.group_out_channels), groups)](
            x,
            weight,
            weight_scale.contiguous(),
            expanded(bias, (conv.out_channels,)),
            out,
            *conv.arguments(),
            R=conv.kernel_size[0],
            S=conv.kernel_size[1],
            UPSAMPLE=upsample,
            DOT=dot_dtype(x),
            **tile.options(),
        )
    return out.to(x.dtype)
