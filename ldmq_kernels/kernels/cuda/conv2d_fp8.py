"""NHWC convolution of FP8 operands as an implicit GEMM, zero padding; csrc/gemm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import gemm
from ldmq_kernels.kernels.operands import check_float8


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
    """Convolution on FP8 activations and FP8 weights, summed in float32 every 128 channels or fewer.

    Args:
        x_q: (N, C, H, W) float8_e4m3fn, C a multiple of 16.
        weight: (K, R, S, C) float8_e4m3fn, K a multiple of 8.
        sample_bias: (N, K) of `out_dtype`, added to every position (the time embedding).
        residual: (N, K, P, Q) of `out_dtype`, added last.
        groups: 1.
        out_dtype: float16, bfloat16 or float32.

    Raises:
        Unsupported: a GPU without FP8, groups, a packed weight, or an operand of another dtype or size.
    """
    check_float8(x_q.device)
    epilogue = gemm.Epilogue(x_scale, weight_scale, bias, residual, sample_bias)
    geometry = (kernel_size, stride, padding, dilation, groups, upsample)
    return gemm.conv2d("conv2d_fp8", x_q, weight, torch.float8_e4m3fn, epilogue, geometry, out_dtype)
