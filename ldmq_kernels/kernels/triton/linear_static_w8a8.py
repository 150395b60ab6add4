"""out = ((quantize_static(x) @ weight^T) * x_scale * weight_scale + bias) * gate + residual, in exact int32.

For inputs whose producer cannot quantize them. Where few tiles share a row of x, the GEMM's main loop quantizes x on
its way to the tensor cores; where many would each do that again, a launch of its own does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.operands import plain
from ldmq_kernels.kernels.triton.epilogue import Epilogue
from ldmq_kernels.kernels.triton.launch import floating
from ldmq_kernels.kernels.triton.linear_w8a8 import gemm
from ldmq_kernels.kernels.triton.quantize_static import quantize_static

MAX_N = 640  # output channels: four tiles, each of which quantizes the input again
SMALL_M = 128  # rows up to which one launch costs less than two whatever they do


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
    """Linear layer that quantizes its input with a calibrated scale and multiplies int8 by int8.

    Raises:
        Unsupported: a packed weight, or an operand of another dtype or size.
    """
    n, k = weight_scale.shape[0], x.shape[-1]
    weight = plain(weight, torch.int8, (n, k))
    if inv_scale.numel() not in (1, k):
        raise Unsupported(f"{inv_scale.numel()} inverse scales for {k} channels")
    epilogue = Epilogue(x_scale, weight_scale, bias, residual=residual, gate=gate)
    if n > MAX_N and x.numel() > SMALL_M * k:
        return gemm("linear_w8a8", quantize_static(x, inv_scale, -1), None, weight, epilogue, x.dtype)
    return gemm("linear_static_w8a8", floating(x), inv_scale.contiguous(), weight, epilogue, x.dtype)
