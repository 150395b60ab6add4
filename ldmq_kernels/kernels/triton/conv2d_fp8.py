"""out = conv(x_q, weight) * x_scale * weight_scale + bias + sample_bias + residual, of FP8 in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.operands import check_float8
from ldmq_kernels.kernels.triton.conv2d_w8a8 import convolve
from ldmq_kernels.kernels.triton.convolution import ConvShape
from ldmq_kernels.kernels.triton.epilogue import Epilogue
from ldmq_kernels.numerics.formats.float8 import FLOAT8


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

    Raises:
        Unsupported: a GPU without FP8, a packed weight, or an operand of another dtype or size.
    """
    check_float8(x_q.device)
    conv = ConvShape.of(x_q, weight_scale.shape[0], kernel_size, stride, padding, dilation, groups, upsample)
    epilogue = Epilogue(x_scale, weight_scale, bias, sample_bias, residual)
    return convolve("conv2d_fp8", FLOAT8, conv, x_q, weight, epilogue, out_dtype)
