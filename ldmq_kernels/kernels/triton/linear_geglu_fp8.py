"""out = value * gelu(gate), [value | gate] = (x_q @ weight^T) * x_scale * weight_scale + bias, of FP8 in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.operands import check_float8, plain, quantized
from ldmq_kernels.kernels.triton.linear_geglu_w8a8 import geglu
from ldmq_kernels.numerics.formats.float8 import FLOAT8


def linear_geglu_fp8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_inv_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """GEGLU layer on FP8 activations and FP8 weights.

    Raises:
        Unsupported: a GPU without FP8, a packed weight, or an operand of another dtype or size.
    """
    check_float8(x_q.device)
    weight = plain(weight, FLOAT8, (weight_scale.shape[0], x_q.shape[-1]))
    x_q = quantized(x_q, FLOAT8)
    return geglu("linear_geglu_fp8", x_q, x_scale, weight, weight_scale, bias, out_inv_scale, out_dtype)
