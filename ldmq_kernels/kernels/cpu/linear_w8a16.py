"""out = x @ (weight * weight_scale)^T + bias, in x's dtype, with the weight restored for this call alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.dequantize import dequantize_int8


def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on int8 weights and floating activations."""
    restored = dequantize_int8(weight, weight_scale, x.dtype)
    return torch.nn.functional.linear(x, restored, None if bias is None else bias.to(x.dtype))
