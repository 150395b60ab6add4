"""out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual, the GEMM in exact int32; csrc/gemm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import gemm


def linear_w8a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
    out_inv_scale: Tensor | None = None,
) -> Tensor:
    """Linear layer on int8 activations and int8 weights.

    Args:
        x_q: (..., K) int8, K a multiple of 16.
        weight: (N, K) int8, N a multiple of 8.
        residual: (..., N) of `out_dtype`, added last.
        out_dtype: float16, bfloat16 or float32; int8 with `out_inv_scale`.
        out_inv_scale: (1,) or (N,) float32: the output is quantized for the next int8 layer.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    epilogue = gemm.Epilogue(x_scale, weight_scale, bias, residual, out_inv_scale=out_inv_scale, gate=gate)
    return gemm.linear("linear_w8a8", x_q, weight, torch.int8, epilogue, out_dtype)
