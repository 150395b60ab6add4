"""NHWC convolution as an implicit int8 GEMM, zero padding; csrc/gemm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import gemm


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
    epilogue = gemm.Epilogue(x_scale, weight_scale, bias, residual, sample_bias, out_inv_scale)
    geometry = (kernel_size, stride, padding, dilation, groups, upsample)
    return gemm.conv2d("conv2d_w8a8", x_q, weight, torch.int8, epilogue, geometry, out_dtype)
