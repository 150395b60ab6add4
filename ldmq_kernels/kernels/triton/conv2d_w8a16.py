"""out = conv(x, weight) * weight_scale + bias: int8 weights become x's dtype in registers, exactly.

The product is transposed: the weight is operand A, converted in registers, and a window of x is operand B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmq_kernels.kernels.triton.configurations import choose, grid
from ldmq_kernels.kernels.triton.conv2d_pointers import convolve_by_pointers
from ldmq_kernels.kernels.triton.convolution import Convolution, load_window, pixels_of_window, window_of_tile
from ldmq_kernels.kernels.triton.launch import (
    ALIGNMENT,
    dot_dtype,
    float_op,
    floating,
    on_device,
    plain,
    stored_dtype,
)
from ldmq_kernels.kernels.triton.matrix import store_tile, tile_of_program


@triton.jit
def _conv2d_w8a16(
    x: tl.tensor,  # descriptor of (N, H, W, C) floating
    weight: tl.tensor,  # descriptor of (K, R * S, C) int8
    weight_scale_ptr: tl.tensor,  # (K,) float32
    bias_ptr: tl.tensor,  # (K,) floating, or None
    out_ptr: tl.tensor,  # (N, P, Q, K) of x's dtype
    windows: tl.tensor,
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
) -> None:
    BLOCK_S: tl.constexpr = BLOCK_M // (BLOCK_H * BLOCK_W)
    tile_row, tile_column = tile_of_program(tl.program_id(0), windows, tl.cdiv(out_channels, BLOCK_N))
    n, h, w, parity = window_of_tile(tile_row, out_height, out_width, UPSAMPLE, BLOCK_S, BLOCK_H, BLOCK_W)
    first_column = tile_column * BLOCK_N
    blocks = tl.cdiv(channels, BLOCK_K)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(0, TAPS * blocks):
        tap, c = step // blocks, step % blocks * BLOCK_K
        block = tl.reshape(weight.load([first_column, tap, c]), (BLOCK_N, BLOCK_K))
        x_block = load_window(
            x,
            n,
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
    row, sample, row_mask = pixels_of_window(
        n, h, w, parity, samples, out_height, out_width, UPSAMPLE, BLOCK_M, BLOCK_H, BLOCK_W
    )
    terms = (None, weight_scale_ptr, bias_ptr, None, None)
    rows = samples * out_height * out_width
    store_tile(
        tl.trans(accumulator),
        terms,
        out_ptr,
        rows,
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
    epilogue = conv.epilogue(None, weight_scale, bias, None, None)
    if out.numel() == 0:
        return out.to(x.dtype)
    by_windows = (
        x.dtype != torch.float32
        and conv.has_windows(x)
        and conv.channels % ALIGNMENT == 0
        and weight.data_ptr() % ALIGNMENT == 0
    )
    tile = choose("conv2d_w8a16" if by_windows else float_op("conv2d_w8a16 pointers", x), conv.problem, x.device)
    with on_device(x):
        if by_windows:
            window = conv.window(tile.rows)
            _conv2d_w8a16[grid(tile, conv.windows(window), conv.out_channels, x.device)](
                conv.window_descriptor(x, window, tile.depth),
                conv.weight_descriptor(weight, tile.columns, tile.depth),
                epilogue.weight_scale,
                epilogue.bias,
                out,
                conv.windows(window),
                *conv.sizes(),
                **conv.window_arguments(window),
                DOT=dot_dtype(x),
                **tile.options(),
            )
        else:
            convolve_by_pointers(conv, tile, x, weight, None, epilogue, out, dot_dtype(x))
    return out.to(x.dtype)
