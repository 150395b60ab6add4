"""out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual, the GEMM of FP8 in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.operands import check_float8, plain, quantized
from ldmq_kernels.kernels.triton.epilogue import Epilogue
from ldmq_kernels.kernels.triton.linear_w8a8 import gemm
from ldmq_kernels.numerics.formats.float8 import FLOAT8


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
    """Linear layer on FP8 activations and FP8 weights.

    Raises:
        Unsupported: a GPU without FP8, a packed weight, or an operand of another dtype or size.
    """
    check_float8(x_q.device)
    weight = plain(weight, FLOAT8, (weight_scale.shape[0], x_q.shape[-1]))
    epilogue = Epilogue(x_scale, weight_scale, bias, residual=residual, gate=gate)
    return gemm("linear_fp8", quantized(x_q, FLOAT8), None, weight, epilogue, out_dtype)
