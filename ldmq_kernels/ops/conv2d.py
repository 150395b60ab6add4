"""Convolutions on quantized weights, zero padding; activations and outputs are channels_last in memory.

The epilogue, in float32, is rounded once: out = accumulator * x_scale * weight_scale + bias
+ sample_bias[:, :, None, None] + residual. int4 weights hold two values to a byte along the last axis, low nibble
first.
A weight may also be in the packed layout of a backend, which no longer shows the kernel's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.kernels.agreement import FLOAT8_SUMS
from ldmq_kernels.kernels.geometry import conv2d_output_size
from ldmq_kernels.kernels.op_spec import Conv2dShape
from ldmq_kernels.numerics.formats.float8 import FLOAT8
from ldmq_kernels.ops.operands import of_picture
from ldmq_kernels.ops.spec import LDMQ, op


def _metadata(call: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    window = (call.kernel_size, call.stride, call.padding, call.dilation, call.upsample)
    size = conv2d_output_size((x.shape[2], x.shape[3]), *window)
    shape = (x.shape[0], call.weight_scale.shape[0], *size)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@op(fake=lambda call: _metadata(call, call.x_q, call.out_dtype), shape=Conv2dShape(), example=of_picture)
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

    out = conv(x_q, weight) * x_scale * weight_scale + bias + sample_bias + residual, in exact integers.

    Args:
        x_q: (N, C, H, W) int8.
        x_scale: (1,) or (N,) float32.
        weight: (K, R, S, C / groups) int8, or a backend's packed form of it.
        weight_scale: (K,) float32.
        bias: (K,) floating.
        sample_bias: (N, K) floating, added to every position (the time embedding).
        residual: (N, K, P, Q) floating, added last.
        kernel_size: (R, S), which a packed weight no longer shows.
        stride: steps (vertical, horizontal).
        padding: zeros at (top, bottom, left, right).
        dilation: distances of the taps (vertical, horizontal).
        groups: of channels, which divide C and K.
        upsample: factor of nearest-neighbour enlargement of the input, 1 or 2.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        (N, K, P, Q) of `out_dtype`, channels_last.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.conv2d_w8a8.default(
        x_q,
        x_scale,
        weight,
        weight_scale,
        bias,
        sample_bias,
        residual,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        upsample,
        out_dtype,
    )


@op(fake=lambda call: _metadata(call, call.x_q, call.out_dtype), shape=Conv2dShape(), example=of_picture)
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

    out = conv(x_q, weight * multiplier) * x_scale * weight_scale + bias + sample_bias + residual, in exact
    integers.

    Args:
        x_q: (N, C, H, W) int8.
        x_scale: (1,) or (N,) float32.
        weight: (K, R, S, ceil(C / groups / 2)) uint8 holding int4, or a backend's packed form of it.
        multiplier: (K, R, S, weight groups) uint8 in 1..18.
        weight_scale: (K,) float32.
        bias: (K,) floating.
        sample_bias: (N, K) floating, added to every position (the time embedding).
        residual: (N, K, P, Q) floating, added last.
        kernel_size: (R, S), which a packed weight no longer shows.
        stride: steps (vertical, horizontal).
        padding: zeros at (top, bottom, left, right).
        dilation: distances of the taps (vertical, horizontal).
        groups: of channels, which divide C and K.
        upsample: factor of nearest-neighbour enlargement of the input, 1 or 2.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        (N, K, P, Q) of `out_dtype`, channels_last.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.conv2d_w4a8.default(
        x_q,
        x_scale,
        weight,
        multiplier,
        weight_scale,
        bias,
        sample_bias,
        residual,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        upsample,
        out_dtype,
    )


@op(
    fake=lambda call: _metadata(call, call.x_q, call.out_dtype),
    shape=Conv2dShape(),
    example=of_picture,
    agreement=FLOAT8_SUMS,
    operand_dtype=FLOAT8,
)
def conv2d_fp8(
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
    """Convolution on FP8 activations and FP8 weights, zero padding.

    out = conv(x_q, weight) * x_scale * weight_scale + bias + sample_bias + residual, the sum of products in
    float32, as `linear_fp8` has it.

    Args:
        x_q: (N, C, H, W) float8_e4m3fn.
        x_scale: (1,) or (N,) float32.
        weight: (K, R, S, C / groups) float8_e4m3fn, or a backend's packed form of it.
        weight_scale: (K,) float32.
        bias: (K,) floating.
        sample_bias: (N, K) floating, added to every position (the time embedding).
        residual: (N, K, P, Q) floating, added last.
        kernel_size: (R, S), which a packed weight no longer shows.
        stride: steps (vertical, horizontal).
        padding: zeros at (top, bottom, left, right).
        dilation: distances of the taps (vertical, horizontal).
        groups: of channels, which divide C and K.
        upsample: factor of nearest-neighbour enlargement of the input, 1 or 2.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        (N, K, P, Q) of `out_dtype`, channels_last.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.conv2d_fp8.default(
        x_q,
        x_scale,
        weight,
        weight_scale,
        bias,
        sample_bias,
        residual,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        upsample,
        out_dtype,
    )


@op(fake=lambda call: _metadata(call, call.x, call.x.dtype), shape=Conv2dShape(), example=of_picture, rounds=False)
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

    out = conv(x, weight) * weight_scale + bias, in float32, rounded once.

    Args:
        x: (N, C, H, W) floating.
        weight: (K, R, S, C / groups) int8.
        weight_scale: (K,) float32.
        bias: (K,) floating.
        kernel_size: (R, S).
        stride: steps (vertical, horizontal).
        padding: zeros at (top, bottom, left, right).
        dilation: distances of the taps (vertical, horizontal).
        groups: of channels, which divide C and K.
        upsample: factor of nearest-neighbour enlargement of the input, 1 or 2.

    Returns:
        (N, K, P, Q) of x's dtype, channels_last.

    Raises:
        RuntimeError: no backend takes these arguments; the text says why each of them refused.
    """
    return LDMQ.conv2d_w8a16.default(
        x, weight, weight_scale, bias, kernel_size, stride, padding, dilation, groups, upsample
    )
