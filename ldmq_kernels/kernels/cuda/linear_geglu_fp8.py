"""GEGLU in the epilogue of an FP8 product, [value | gate] = x_q @ weight^T with scales and bias; csrc/gemm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import gemm
from ldmq_kernels.kernels.operands import check_float8, check_gated_output


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

    Args:
        x_q: (..., K) float8_e4m3fn, K a multiple of 16.
        weight: (2 N, K) float8_e4m3fn, N a multiple of 8.

    Raises:
        Unsupported: a GPU without FP8, a packed weight, an output that does not fit `out_inv_scale`, or an operand of
            another dtype or size.
    """
    check_float8(x_q.device)
    check_gated_output(out_inv_scale, out_dtype, weight_scale.shape[0] // 2)
    epilogue = gemm.Epilogue(x_scale, weight_scale, bias, out_inv_scale=out_inv_scale)
    return gemm.linear("linear_geglu_fp8", x_q, weight, torch.float8_e4m3fn, epilogue, out_dtype)
