"""out = conv(x_q, weight) * x_scale * weight_scale + bias + sample_bias + residual, widened to float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.conv2d_w8a8 import conv2d_w8a8
from ldmq_kernels.kernels.cpu.packing import is_packed
from ldmq_kernels.kernels.cpu.widened import pack_conv2d_float8


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
    """Convolution on FP8 activations and FP8 weights, by one float32 convolution: no CPU multiplies e4m3.

    A plain weight is widened anew in each call; a layer holds it widened.
    """
    packed = weight if is_packed(weight) else pack_conv2d_float8(weight)
    return conv2d_w8a8(  # torch pads and enlarges no float8
        x_q.float(),
        x_scale,
        packed,
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
