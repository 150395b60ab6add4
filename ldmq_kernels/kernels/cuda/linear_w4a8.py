"""The int8 linear over int4 weights times their group multipliers, unpacked in registers; csrc/gemm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cuda import gemm
from ldmq_kernels.kernels.operands import plain, quantized
from ldmq_kernels.numerics.formats.int4 import group_count


def linear_w4a8(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    multiplier: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """Linear layer on int8 activations and two-level int4 weights.

    Args:
        x_q: (..., K) int8, K a multiple of 32.
        weight: (N, K / 2) uint8 holding int4, N a multiple of 8.
        residual: (..., N) of `out_dtype`, added last.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    k, n = x_q.shape[-1], weight_scale.shape[0]
    weight = plain(weight, torch.uint8, (n, -(-k // 2)))
    multiplier = plain(multiplier, torch.uint8, (n, group_count(k)))
    x = quantized(x_q, torch.int8).reshape(-1, k).contiguous()
    out = torch.empty((*x_q.shape[:-1], n), dtype=out_dtype, device=x.device)
    epilogue = gemm.Epilogue(x_scale, weight_scale, bias, residual, gate=gate)
    return gemm.run("linear_w4a8", x, weight, multiplier, epilogue, out, channels=k)
