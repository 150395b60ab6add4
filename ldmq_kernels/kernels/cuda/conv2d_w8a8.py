"""NHWC convolution as an implicit int8 GEMM, zero padding; csrc/gemm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import gemm
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.geometry import conv2d_output_size
from ldmq_kernels.kernels.operands import plain, quantized


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
    out_inv_scale: Tensor | None = None,
) -> Tensor:
    """Convolution on int8 activations and int8 weights.

    Args:
        x_q: (N, C, H, W) int8, C a multiple of 16.
        weight: (K, R, S, C) int8, K a multiple of 8.
        sample_bias: (N, K) of `out_dtype`, added to every position (the time embedding).
        residual: (N, K, P, Q) of `out_dtype`, added last.
        groups: 1.
        out_dtype: float16, bfloat16 or float32; int8 with `out_inv_scale`.
        out_inv_scale: (1,) or (K,) float32: the output is quantized for the next int8 layer.

    Raises:
        Unsupported: groups, a packed weight, or an operand of another dtype or size.
    """
    if groups != 1:
        raise Unsupported(f"groups is {groups}, must be 1")
    samples, channels, height, width = x_q.shape
    out_channels = weight_scale.shape[0]
    size = conv2d_output_size((height, width), kernel_size, stride, padding, dilation, upsample)
    weight = plain(weight, torch.int8, (out_channels, *kernel_size, channels))
    x = quantized(x_q, torch.int8).contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (samples, out_channels, *size), dtype=out_dtype, device=x.device, memory_format=torch.channels_last
    )
    top, _, left, _ = padding
    conv = gemm.ConvShape(samples, height, width, *size, *kernel_size, *stride, *dilation, top, left, upsample)
    epilogue = gemm.Epilogue(x_scale, weight_scale, bias, residual, sample_bias, out_inv_scale)
    return gemm.run("conv2d_w8a8", x, weight, None, epilogue, out, channels=channels, conv=conv)
