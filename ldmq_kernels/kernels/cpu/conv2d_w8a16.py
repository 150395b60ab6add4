"""out = conv(x, weight * weight_scale) + bias, in x's dtype, with the weight restored for this call alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.dequantize import dequantize_int8
from ldmq_kernels.kernels.geometry import enlarged_and_padded


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
    """Convolution on int8 weights and floating activations, zero padding."""
    restored = dequantize_int8(weight, weight_scale, x.dtype).permute(0, 3, 1, 2)
    shift = None if bias is None else bias.to(x.dtype)
    x, pads = enlarged_and_padded(x, padding, upsample)
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.nn.functional.conv2d(x, restored, shift, stride, pads, dilation, groups)
    return out.contiguous(memory_format=torch.channels_last)
