"""out = ((x_q @ weight^T) * x_scale * weight_scale + bias) * gate + residual of FP8 operands; csrc/gemm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import gemm
from ldmq_kernels.kernels.operands import check_float8


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
    """Linear layer on FP8 activations and FP8 weights, summed in float32 every 128 channels or fewer.

    Args:
        x_q: (..., K) float8_e4m3fn, K a multiple of 16.
        weight: (N, K) float8_e4m3fn, N a multiple of 8.
        residual: (..., N) of `out_dtype`, added last.
        out_dtype: float16, bfloat16 or float32.

    Raises:
        Unsupported: a GPU without FP8, a packed weight, or an operand of another dtype or size.
    """
    check_float8(x_q.device)
    epilogue = gemm.Epilogue(x_scale, weight_scale, bias, residual, gate=gate)
    return gemm.linear("linear_fp8", x_q, weight, torch.float8_e4m3fn, epilogue, out_dtype)
