"""out = ((quantize_static(x) @ weight^T) * x_scale * weight_scale + bias) * gate + residual, in exact integers."""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.cpu.linear_w8a8 import linear_w8a8
from ldmq_kernels.kernels.cpu.quantize_static import quantize_static


def linear_static_w8a8(
    x: Tensor,
    inv_scale: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer that quantizes its input with a calibrated scale and multiplies int8 by int8."""
    return linear_w8a8(quantize_static(x, inv_scale, -1), x_scale, weight, weight_scale, bias, residual, x.dtype, gate)
