"""out = value * gelu(gate), of the product's two halves in float32; then rounded once, or quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.operands import check_gated_output
from ldmq_kernels.kernels.reference.linear_w8a8 import linear_w8a8
from ldmq_kernels.kernels.reference.quantize_static import quantize_static


def gated(product: Tensor, out_inv_scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """GEGLU of (..., 2 N) float32, values and then gates, in the dtype that is asked for."""
    check_gated_output(out_inv_scale, out_dtype, product.shape[-1] // 2)
    value, gate = product.chunk(2, dim=-1)
    out = value * torch.nn.functional.gelu(gate)
    return out.to(out_dtype) if out_inv_scale is None else quantize_static(out, out_inv_scale, -1, out_dtype)


def linear_geglu_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """GEGLU layer on int8 activations and int8 weights."""
    product = linear_w8a8(x_q, x_scale, weight, weight_scale, bias, None, torch.float32)
    return gated(product, out_inv_scale, out_dtype)
