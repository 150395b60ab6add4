"""What the producers in torch share: the quantization at their end, block by block.

Where `compiled_producers` does not serve (float16, FP8, no C compiler), a producer is the float op of torch in x's own
dtype and this backend's quantization: the values are those of the unfused layers, and differ from the float32
definition by one step where that dtype's rounding does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu.quantize_per_token import quantize_per_token
from ldmq_kernels.kernels.cpu.quantize_static import quantize_static
from ldmq_kernels.kernels.reference.producers import no_scale


def quantize_tokens(
    y: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(..., C) with a calibrated scale, or with each token's own."""
    if inv_scale is not None:
        return quantize_static(y, inv_scale, -1, q_dtype), no_scale(y)
    return quantize_per_token(y, inv_smooth, q_dtype)


def in_dtype_of(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """A norm's parameter in x's dtype, which torch's norms ask for."""
    return None if parameter is None else parameter.to(x.dtype)
