"""Weights back in the activations' dtype, for the formats that only store them in few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.blocks import row_blocks
from ldmq_kernels.numerics.formats.int4 import expand_groups, unpack_int4


def dequantize_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, ...) int8 times (N,) float32, rounded once to `dtype`."""
    rows = weight.reshape(weight.shape[0], -1)
    out = torch.empty(rows.shape, dtype=dtype, device=weight.device)
    for block in row_blocks(*rows.shape):
        out[block].copy_(rows[block].float().mul_(scale[block].unsqueeze(1)))
    return out.view(weight.shape)


def dequantize_int4(weight: Tensor, group_scale: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(N, ceil(K / 2)) uint8 holding int4, times (N, groups) float32, rounded once to `dtype`; (N, K)."""
    out = torch.empty((weight.shape[0], channels), dtype=dtype, device=weight.device)
    for block in row_blocks(*out.shape):
        integers = unpack_int4(weight[block], channels)
        out[block].copy_(integers.float().mul_(expand_groups(group_scale[block], channels)))
    return out
