"""out = conv(x_q, weight) * x_scale * weight_scale + bias + sample_bias + residual, in exact integers."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.geometry import enlarged_and_padded


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
    """Convolution on int8 activations and int8 weights, zero padding."""
    x_q, pads = enlarged_and_padded(x_q, padding, upsample)
    accumulator = torch.nn.functional.conv2d(
        x_q.double(), weight.permute(0, 3, 1, 2).double(), None, stride, pads, dilation, groups
    ).float()
    out = accumulator * x_scale.view(-1, 1, 1, 1) * weight_scale.view(1, -1, 1, 1)
    if bias is not None:
        out = out + bias.float().view(1, -1, 1, 1)
    if sample_bias is not None:
        out = out + sample_bias.float()[:, :, None, None]
    if residual is not None:
        out = out + residual.float()
    return out.to(out_dtype).contiguous(memory_format=torch.channels_last)
