"""out = x @ (weight * group_scale)^T + bias, in x's dtype, with the weight restored for this call alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.dequantize import dequantize_int4


def linear_w4a16(x: Tensor, weight: Tensor, group_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on int4 weights with a scale for each group, and floating activations."""
    restored = dequantize_int4(weight, group_scale, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, restored, None if bias is None else bias.to(x.dtype))
