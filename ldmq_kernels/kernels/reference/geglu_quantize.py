"""q = quantize(value * gelu(gate)), in float32 up to the last rounding; GELU by the error function."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.reference.producers import quantize_tokens


def geglu_quantize(
    x: Tensor, inv_scale: Tensor | None, inv_smooth: Tensor | None, q_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The gated half of a GEGLU layer and the quantization of its result."""
    value, gate = x.float().chunk(2, dim=-1)
    return quantize_tokens(value * torch.nn.functional.gelu(gate), inv_scale, inv_smooth, q_dtype)
