"""out = value * gelu(gate), of the FP8 product's two halves in float32; then rounded once, or quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.linear_fp8 import linear_fp8
from ldmq_kernels.kernels.reference.linear_geglu_w8a8 import gated


def linear_geglu_fp8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """GEGLU layer on FP8 activations and FP8 weights."""
    product = linear_fp8(x_q, x_scale, weight, weight_scale, bias, None, torch.float32)
    return gated(product, out_inv_scale, out_dtype)
