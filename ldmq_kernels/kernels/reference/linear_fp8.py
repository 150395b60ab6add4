"""out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual, sums in float64, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.linear_w8a8 import linear_w8a8


def linear_fp8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer on FP8 activations and FP8 weights: the integers' definition, whose float64 holds e4m3 too."""
    return linear_w8a8(x_q, x_scale, weight, weight_scale, bias, residual, out_dtype, gate)
