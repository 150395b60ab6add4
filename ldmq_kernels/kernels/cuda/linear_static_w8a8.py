"""linear_w8a8 of quantize_static, in two launches; csrc/quantize.cu and csrc/gemm.cu."""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.cuda.linear_w8a8 import linear_w8a8
from ldmq_kernels.kernels.cuda.quantize_static import quantize_static


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
    """Linear layer on floating activations with a calibrated scale.

    Args:
        residual: (..., N) of x's dtype, added last.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    x_q = quantize_static(x.contiguous(), inv_scale, -1)
    return linear_w8a8(x_q, x_scale, weight, weight_scale, bias, residual, x.dtype, gate)
