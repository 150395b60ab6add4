"""out = conv(x, weight) * weight_scale + bias, in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

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
    x_padded, pads = enlarged_and_padded(x, padding, upsample)
    out = torch.nn.functional.conv2d(
        x_padded.float(), weight.permute(0, 3, 1, 2).float(), None, stride, pads, dilation, groups
    )
    out = out * weight_scale.view(1, -1, 1, 1)
    if bias is not None:
        out = out + bias.float().view(1, -1, 1, 1)
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last)
