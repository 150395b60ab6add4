"""out = conv(x, weight) * weight_scale + bias, in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def conv2d_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Convolution on int8 weights and floating activations, zero padding.

    Args:
        x: (N, C, H, W) floating.
        weight: (K, R, S, C / groups) int8.
        weight_scale: (K,) float32.
        bias: (K,) floating.

    Returns:
        (N, K, P, Q) of x's dtype, channels_last.
    """
    out = torch.nn.functional.conv2d(
        x.float(), weight.permute(0, 3, 1, 2).float(), None, stride, padding, dilation, groups
    )
    out = out * weight_scale.view(1, -1, 1, 1)
    if bias is not None:
        out = out + bias.float().view(1, -1, 1, 1)
    return out.to(x.dtype).contiguous(memory_format=torch.channels_last)
