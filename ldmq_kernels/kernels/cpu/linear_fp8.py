"""out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual, widened to float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.linear_w8a8 import linear_w8a8
from ldmq_kernels.kernels.cpu.packing import is_packed
from ldmq_kernels.kernels.cpu.widened import pack_linear_float8


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
    """Linear layer on FP8 activations and FP8 weights, by one float32 product: no CPU multiplies e4m3.

    A plain weight is widened anew in each call; a layer holds it widened.
    """
    packed = weight if is_packed(weight) else pack_linear_float8(weight)
    return linear_w8a8(x_q, x_scale, packed, weight_scale, bias, residual, out_dtype, gate)
